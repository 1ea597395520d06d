"""Rows of local files and of hub data sets, one at a time, each with where it stands. Only .json is read whole."""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_ft.core.errors import DataError
from lora_ft.core.messages import first_line, printable
from lora_ft.core.names import is_local, nearest
from lora_ft.core.storage import sha256
from lora_ft.data.delimited import OLD_MAC, read_csv, read_tsv, text_lines

KNOWN = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ONE_TEXT = (
    "Make one row of it: python -c 'import json, sys; print(json.dumps({\"text\": sys.stdin.read()}))' < OLD > NEW.jsonl, "
    'and learn it with data.text: "{text}" and data.long_text: split.'
)
# What to do about other kinds of files.
WAYS = {suffix: "Unpack it first." for suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")}
WAYS |= {suffix: "Save it as .csv." for suffix in (".xlsx", ".xls", ".ods")}
WAYS |= {suffix: "Read it with `datasets` and write it with its to_parquet." for suffix in (".arrow", ".feather")}
WAYS |= {".txt": ONE_TEXT, ".md": ONE_TEXT}
ONE_A_LINE = "A .jsonl file has one whole JSON object on every line."


class Row(NamedTuple):
    """where: `reviews.jsonl:17`, for a message. columns: the row's values by column name. problem: why there are none."""

    where: str
    columns: dict[str, Any]
    problem: str = ""


def iter_rows(source: str) -> Iterator[Row]:
    """The rows of a local .jsonl, .json, .csv, .tsv or .parquet file, or of a hub data set `id[:config][@split]`.

    Raises:
        DataError: no such file, not such a file, one that can't be read on (path:line), or a hub that can't be reached.
    """
    if not is_local(source):
        dataset = _load_hub(source)
        yield from (Row(f"{source} row {i}", columns) for i, columns in enumerate(dataset, 1))
        return
    path = _file(source)
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _jsonl(path)
        elif suffix == ".json":
            yield from _json(path)
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            records = read_csv(path) if suffix == ".csv" else read_tsv(path)
            yield from (Row(f"{_name(path)}:{line}", columns, problem) for line, columns, problem in records)
    except OSError as e:
        raise DataError(f"{_name(path)}: can't be read: {e.strerror or e}.") from e


def content_hash(source: str) -> str:
    """SHA-256 of a file's bytes; for a hub data set, of its fingerprint, which follows from its revision and split."""
    if not is_local(source):
        return hashlib.sha256(_load_hub(source)._fingerprint.encode()).hexdigest()
    path = _file(source)
    try:
        return sha256(path)
    except OSError as e:
        raise DataError(f"{_name(path)}: can't be read: {e.strerror or e}.") from e


def _name(path: Path) -> str:
    return printable(str(path))


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in KNOWN)[:5]
        found = f" It holds {', '.join(map(printable, inside))}: name a file, or a list of them." if inside else ""
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = f" {WAYS['.arrow']}"  # a folder of `Dataset.save_to_disk`
        raise DataError(f"{_name(path)}: a folder, not a data file.{found}")
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else None
        hint = f" Is {_name(path.parent / near)} meant?" if near else ""
        raise DataError(f"{_name(path)}: no such file. Paths are resolved against the current folder.{hint}")
    suffix = path.suffix.lower()
    if suffix not in KNOWN:
        way = f" {WAYS[suffix]}" if suffix in WAYS else ""
        raise DataError(f"{_name(path)}: not a known kind of data file; the known ones end in {', '.join(KNOWN)}.{way}")
    return path


def _parse(parse, where: str):
    """The value of `parse()`, a call of the json module; its errors as a DataError that begins with `where`."""
    try:
        return parse()
    except (ValueError, RecursionError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise DataError(f"{where}{line}: {_broken(e)}.") from e


def _broken(error: Exception) -> str:
    """What is wrong with JSON; beside its grammar, numbers of thousands of digits and nesting a thousand deep."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (column {error.colno})"
    return f"broken JSON: {error}"


def _wrong_row(value: Any) -> str:
    """Why a JSON value is no row; nothing if it is one."""
    if isinstance(value, dict):
        return ""
    return f'a row is a JSON object, {{"column": value, ...}}; found a {type(value).__name__}'


def _object(value: Any, where: str) -> dict[str, Any]:
    if problem := _wrong_row(value):
        raise DataError(f"{where}: {problem}.")
    return value


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            where = f"{_name(path)}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as e:
                hint = OLD_MAC if "\r" in line.rstrip() else ""
                yield Row(where, {}, f"{_broken(e)}. {ONE_A_LINE}{hint}")
            else:
                problem = _wrong_row(value)
                yield Row(where, {} if problem else value, problem)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or {"data": [...]}; also JSON Lines, which many a .json file holds."""
    text, name, decoder = "".join(text_lines(path)), _name(path), json.JSONDecoder()
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        yield from _array(text, start, name)
    elif start < len(text):
        value, end = _parse(lambda: decoder.raw_decode(text, start), name)
        if isinstance(value, dict) and text[end:].strip():
            yield from _jsonl(path)
        elif isinstance(value, dict) and isinstance(value.get("data"), list):
            for i, row in enumerate(value["data"], 1):
                yield Row(f"{name} row {i}", _object(row, f"{name} row {i}"))
        else:
            raise DataError(f'{name}: a .json file is a list of objects, or {{"data": [...]}}.')


def _array(text: str, start: int, name: str) -> Iterator[Row]:
    """The elements of the array at `start`, one in memory at a time; `where` is the line on which each begins."""
    decoder, ink = json.JSONDecoder(), re.compile(r"[^ \t\r\n]|\Z")

    def after_blanks(position: int) -> int:
        match = ink.search(text, position)
        assert match  # the end, if nothing else
        return match.start()

    at = after_blanks(start + 1)
    line, counted = 1, 0
    closed = text.startswith("]", at)
    while not closed:
        value, end = _parse(lambda at=at: decoder.raw_decode(text, at), name)
        line, counted = line + text.count("\n", counted, at), at
        yield Row(f"{name}:{line}", _object(value, f"{name}:{line}"))
        at = after_blanks(end)
        closed = text.startswith("]", at)
        if not closed:
            if not text.startswith(",", at):
                raise DataError(
                    f"{name}:{line + text.count(chr(10), counted, at)}: broken JSON: ',' or ']' is missing."
                )
            at = after_blanks(at + 1)
    if text[at + 1 :].strip():
        raise DataError(
            f"{name}:{line + text.count(chr(10), counted, at)}: broken JSON: something after the closing ']'."
        )


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    name = _name(path)
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            batches = file.iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from (Row(f"{name} row {i}", row) for i, row in enumerate(rows, 1))
    except pyarrow.ArrowException as e:
        raise DataError(f"{name}: not a whole Parquet file: {first_line(e)}") from e


@lru_cache(maxsize=8)  # a source is hashed, then read
def _load_hub(source: str):
    from lora_ft.data.hub import load_split

    return load_split(source)
