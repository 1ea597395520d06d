"""The rows of a .json file that is one object: a list of rows under a key, columns, or rows by their ids."""

from collections.abc import Mapping
from typing import Any

from lora_ft.core.errors import DataError
from lora_ft.core.messages import listed, printable

ROWS_UNDER = (
    "python -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin){}]' < OLD.json > {}.jsonl"
)


def rows_of(value: Mapping[str, Any], name: str) -> list[Any]:
    """The rows of an object: what it has under `data`, the rows of the Hub's viewer, its only list of objects, or the columns
    that it consists of, as lists or as pandas writes them.

    Raises:
        DataError: it can be read in several ways or in none; with the command that writes the rows to a file.
    """
    parts = list(value.values())
    if isinstance(data := value.get("data"), list):
        columns = value.get("columns")
        if isinstance(columns, list) and all(isinstance(row, list) and len(row) == len(columns) for row in data):
            return [dict(zip(columns, row, strict=True)) for row in data]  # pandas' orient="split"
        return data
    rows = value.get("rows")
    if isinstance(rows, list) and rows and all(isinstance(r, dict) and isinstance(r.get("row"), dict) for r in rows):
        return [row["row"] for row in rows]
    is_columns = parts and all(isinstance(part, list) and part for part in parts) and not all(map(_is_rows, parts))
    if is_columns and len({*map(len, parts)}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if len(parts) > 1 and all(isinstance(part, dict) and part.keys() == parts[0].keys() != set() for part in parts):
        if all(key.isdecimal() for key in parts[0]):  # pandas' default: {column: {"0": value, ...}}
            return [{column: part[key] for column, part in value.items()} for key in parts[0]]
        if all(any(not isinstance(v, list | dict) for v in part.values()) for part in parts):
            return parts  # {id: row, ...}
    lists = [key for key, part in value.items() if isinstance(part, list) and _is_rows(part)]
    if len(lists) == 1 and not all("role" in turn or "from" in turn for turn in value[lists[0]]):
        return value[lists[0]]
    if len(lists) > 1:
        raise DataError(
            f"{name}: an object with several lists of rows, {printable(listed(lists), 200)}. Write each to a file: "
            f"{_command(lists[0])}"
        )
    raise DataError(
        f"{name}: a .json file must be a list of objects, an object with one such list, or one with columns of equal length. "
        f"If its rows are deeper in it, write them to a file: {_command('KEY', 'KEY')}"
    )


def _is_rows(value: list) -> bool:
    return bool(value) and all(isinstance(row, dict) for row in value)


def _command(*keys: str) -> str:
    simple = keys[-1] if keys[-1].isidentifier() and keys[-1] != "KEY" else "NEW"
    return printable(ROWS_UNDER.format("".join(f'["{key}"]' for key in keys), simple), 400)
