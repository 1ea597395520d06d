"""How a text file seems to be written: its encoding, separator, quotes and header line."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_ft.core.errors import DataError
from lora_ft.core.names import is_local
from lora_ft.data.delimited import read_delimited
from lora_ft.data.files import DEFAULT, FileFormat, data_files, kind, likely_encoding

MAX_ROWS = 2000
WAYS: tuple[dict[str, Any], ...] = ({}, {"escape": "\\"}, {"separator": ";"}, {"separator": "\t"}, {"separator": "|"})
WAYS += ({"quote": "none"},)


def suggest_format(source: str, name_columns: Callable[[list[list[str]]], Sequence[str]]) -> tuple[dict[str, Any], str]:
    """The settings of `data.format` that read a source, and a note if its first line looks like a row; {} for the default.

    name_columns: the names of columns without a header line, from the first rows.

    Raises:
        DataError: as `data_files`.
    """
    if not is_local(source):
        return {}, ""
    path = data_files(source)[0]
    settings: dict[str, Any] = {}
    if kind(path) == ".parquet":
        return {}, ""
    if (encoding := likely_encoding(path)) != DEFAULT.encoding:
        settings["encoding"] = encoding
    if kind(path) not in (".csv", ".tsv"):
        return settings, ""
    way = next((way for way in WAYS if _reads(path, FileFormat(**settings | way))), {})
    settings |= way
    if (first := _row_as_header(path, FileFormat(**settings))) is None:
        return settings, ""
    rows = [list(columns.values()) for _, columns, _ in _records(path, FileFormat(**settings)) if columns]
    note = f'its first line looks like a row ("{first}"); without this setting it holds the names of the columns'
    return settings | {"header": list(name_columns(rows))}, note


def _records(path: Path, format: FileFormat) -> Iterator[tuple[int, dict[str, str], str]]:
    return itertools.islice(read_delimited(path, format), MAX_ROWS)


def _reads(path: Path, format: FileFormat) -> bool:
    try:
        return not any(problem for _, _, problem in _records(path, format))
    except DataError:
        return False


def _row_as_header(path: Path, format: FileFormat) -> str | None:
    """The value in the header line that looks like the values below it; None for a line of names."""
    try:
        rows = [columns for _, columns, _ in _records(path, format) if columns]
    except DataError:
        return None
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        end = name.strip()[-1:]
        sentence = end in tuple(".?!") and sum(value.strip()[-1:] == end for value in values) > len(values) / 2
        number = re.fullmatch(r"-?[\d.,]+", name.strip())
        if number or sentence or (name.strip() and values.count(name) > 1):
            return name
    return None
