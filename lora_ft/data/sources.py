"""Rows of local files and of hub data sets, one at a time, each with where it stands. Only .json is read whole."""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_ft.data.delimited import read_csv, read_tsv, text_lines
from lora_ft.errors import DataError
from lora_ft.names import is_local, printable
from lora_ft.storage import sha256

KNOWN = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ONE_A_LINE = " A .jsonl file has one whole JSON object on every line."


class Row(NamedTuple):
    """where: `reviews.jsonl:17`, for a message. columns: the row's values by column name."""

    where: str
    columns: dict[str, Any]


def iter_rows(source: str) -> Iterator[Row]:
    """The rows of a local .jsonl, .json, .csv, .tsv or .parquet file, or of a hub data set `id[:config][@split]`.

    Raises:
        DataError: no such file, not such a file, a line that can't be read (path:line), or a hub that can't be reached.
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
            yield from (Row(f"{_name(path)}:{line}", columns) for line, columns in records)
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
        raise DataError(f"{_name(path)}: a folder, not a data file.{found}")
    if not path.exists():
        raise DataError(f"{_name(path)}: no such file. Paths are resolved against the current folder.")
    if path.suffix.lower() not in KNOWN:
        raise DataError(f"{_name(path)}: not a known kind of data file; the known ones end in {', '.join(KNOWN)}.")
    return path


def _parse(parse, where: str, hint: str = ""):
    """The value of `parse()`, a call of the json module; its errors as a DataError that begins with `where`."""
    try:
        return parse()
    except json.JSONDecodeError as e:
        line = f":{e.lineno}" if not where.rpartition(":")[2].isdigit() else ""
        raise DataError(f"{where}{line}: broken JSON: {e.msg} (column {e.colno}).{hint}") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits; nesting a thousand deep
        raise DataError(f"{where}: broken JSON: {e}.") from e


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a row is a JSON object, {{"column": value, ...}}; found a {type(value).__name__}.')
    return value


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            where = f"{_name(path)}:{number}"
            value = _parse(lambda line=line: json.loads(line), where, ONE_A_LINE)
            yield Row(where, _object(value, where))


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
        raise DataError(f"{name}: not a whole Parquet file: {printable(str(e).splitlines()[0])}") from e


@lru_cache(maxsize=8)  # a source is hashed, then read
def _load_hub(source: str):
    from lora_ft.data.hub import load_split

    return load_split(source)
