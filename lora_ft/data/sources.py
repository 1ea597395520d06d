"""The rows of data files and hub data sets, streamed, each with its location. Only .json files are held in memory."""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_ft.core.errors import DataError
from lora_ft.core.messages import first_line, printable
from lora_ft.core.names import DATA_SUFFIXES, is_local, nearest
from lora_ft.core.paths import local_path, refuse_special
from lora_ft.core.storage import sha256
from lora_ft.data.delimited import OLD_MAC, read_delimited, text_lines

TEXT_FILE = (
    "Make one row of it: python -c 'import json, sys; print(json.dumps({\"text\": sys.stdin.read()}))' < OLD > NEW.jsonl, "
    'and train on it with data.text: "{text}" and data.long_text: split.'
)
CONVERSIONS = {suffix: "Unpack it first." for suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")}
CONVERSIONS |= {suffix: "Save it as .csv." for suffix in (".xlsx", ".xls", ".ods")}
CONVERSIONS |= {suffix: "Read it with `datasets` and write it with to_parquet." for suffix in (".arrow", ".feather")}
CONVERSIONS |= {".txt": TEXT_FILE, ".md": TEXT_FILE}


class SourceRow(NamedTuple):
    """One row: its location for messages (`reviews.jsonl:17`), its values by column, or the problem if it has none."""

    where: str
    columns: dict[str, Any]
    problem: str = ""


def iter_rows(source: str) -> Iterator[SourceRow]:
    """The rows of a local .jsonl, .json, .csv, .tsv or .parquet file, or of a hub data set `id[:config][@split]`.

    A malformed row is yielded with its problem; an error ends the iteration.

    Raises:
        DataError: no such file, an unsupported kind of file, a file damaged so that reading cannot continue (with
            path and line), or a data set that cannot be loaded from the hub.
    """
    if not is_local(source):
        dataset = _load_hub(source)
        yield from (SourceRow(f"{source} row {i}", columns) for i, columns in enumerate(dataset, 1))
        return
    path = _data_file(source)
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _jsonl(path)
        elif suffix == ".json":
            yield from _json(path)
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            records = read_delimited(path)
            yield from (SourceRow(f"{_name(path)}:{line}", columns, problem) for line, columns, problem in records)
    except OSError as e:
        raise DataError(f"{_name(path)}: cannot be read: {e.strerror or e}.") from e


def content_hash(source: str) -> str:
    """SHA-256 of a file's bytes; of a hub data set's fingerprint, which identifies its revision and split. Raises DataError."""
    if not is_local(source):
        return hashlib.sha256(_load_hub(source)._fingerprint.encode()).hexdigest()
    path = _data_file(source)
    try:
        return sha256(path)
    except OSError as e:
        raise DataError(f"{_name(path)}: cannot be read: {e.strerror or e}.") from e


def _name(path: Path) -> str:
    return printable(str(path))


def _data_file(source: str) -> Path:
    path = local_path(source)
    refuse_special(path, DataError)
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in DATA_SUFFIXES)[:5]
        hint = f" It contains {', '.join(map(printable, files))}: name a file, or a list of them." if files else ""
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            hint = f" {CONVERSIONS['.arrow']}"  # a folder written by `Dataset.save_to_disk`
        raise DataError(f"{_name(path)}: a folder, not a data file.{hint}")
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else None
        hint = f" Did you mean {_name(path.parent / near)}?" if near else ""
        raise DataError(f"{_name(path)}: no such file. Paths are relative to the current folder.{hint}")
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        hint = f" {CONVERSIONS[suffix]}" if suffix in CONVERSIONS else ""
        raise DataError(f"{_name(path)}: not a supported data file, which ends in {', '.join(DATA_SUFFIXES)}.{hint}")
    return path


def _json_problem(error: Exception) -> str:
    """An error of the json module: bad syntax, a number of thousands of digits, or nesting thousands deep."""
    located = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return f"broken JSON: {located or error}"


def _json_row(value: Any, where: str) -> SourceRow:
    problem = f'a row must be a JSON object, {{"column": value, ...}}, not a {type(value).__name__}'
    return SourceRow(where, value) if isinstance(value, dict) else SourceRow(where, {}, problem)


def _jsonl(path: Path) -> Iterator[SourceRow]:
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            where = f"{_name(path)}:{number}"
            try:
                row = _json_row(json.loads(line), where)
            except (ValueError, RecursionError) as e:
                hint = OLD_MAC if "\r" in line.rstrip() else ""
                rule = "Each line of a .jsonl file must be one complete JSON object."
                row = SourceRow(where, {}, f"{_json_problem(e)}. {rule}{hint}")
            yield row


def _json(path: Path) -> Iterator[SourceRow]:
    """A list of objects, {"data": [...]}, or JSON Lines, which many .json files contain."""
    text, name = "".join(text_lines(path)), _name(path)
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        yield from _json_array(text, start, name)
    elif start < len(text):
        value, end = _decode(text, start, name)
        if isinstance(value, dict) and text[end:].strip():
            yield from _jsonl(path)
        elif isinstance(value, dict) and isinstance(value.get("data"), list):
            yield from (_json_row(row, f"{name} row {i}") for i, row in enumerate(value["data"], 1))
        else:
            raise DataError(f'{name}: a .json file must be a list of objects, or {{"data": [...]}}.')


def _json_array(text: str, start: int, name: str) -> Iterator[SourceRow]:
    """The elements of the array at `start`, decoded one at a time; `where` is the line each starts on."""
    separator = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")
    match = re.compile(r"\[[ \t\r\n]*(\]?)").match(text, start)
    line, counted = 1, 0
    while match and match[1] != "]":
        at = match.end()
        value, end = _decode(text, at, name)
        line, counted = line + text.count("\n", counted, at), at
        yield _json_row(value, f"{name}:{line}")
        match = separator.match(text, end)
        if match and not match[1]:
            raise DataError(f"{name}:{_line(text, match.end())}: broken JSON: ',' or ']' is missing.")
    if match and text[match.end() :].strip():
        raise DataError(f"{name}:{_line(text, match.end())}: broken JSON: there is text after the closing ']'.")


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _decode(text: str, start: int, name: str) -> tuple[Any, int]:
    """The JSON value at `start`, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line}: {_json_problem(e)}.") from e


def _parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from (SourceRow(f"{_name(path)} row {i}", row) for i, row in enumerate(rows, 1))
    except pyarrow.ArrowException as e:
        raise DataError(f"{_name(path)}: damaged Parquet file: {first_line(e)}") from e


@lru_cache(maxsize=8)  # a source is hashed, then read
def _load_hub(source: str):
    from lora_ft.data.hub import load_split

    return load_split(source)
