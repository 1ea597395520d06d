"""CSV and TSV files with a header line: records, each with the line it starts on."""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_ft.core.errors import DataError
from lora_ft.core.messages import format_value, printable

MAX_FIELD_CHARS = 16 * 2**20  # ends a quote that is never closed before it has swallowed a large file
OLD_MAC = " Its lines end in CR alone, as on old Macs: tr '\\r' '\\n' < OLD > NEW."

Record = tuple[int, dict[str, str], str]  # line it starts on, values by column, the problem if it has no values


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends (only `\\n` ends a line), without a byte-order mark.

    Raises:
        DataError: a byte that is not UTF-8, or is NUL; with path, line and position.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            skipped = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            try:
                line, bad = raw[skipped:].decode(), raw.find(b"\0")
            except UnicodeDecodeError as e:
                bad = skipped + e.start
            if bad >= 0:
                encoding = "UTF-16" if b"\0" in raw else "LATIN1"
                raise DataError(
                    f"{printable(str(path))}:{number}: byte {bad + 1} of the line (0x{raw[bad]:02x}) is not UTF-8 text. "
                    f"Save the file as UTF-8; if it is {encoding}: iconv -f {encoding} -t UTF-8 < OLD > NEW."
                )
            yield line


def read_delimited(path: Path) -> Iterator[Record]:
    """The records of a .csv or .tsv file with a header line.

    .csv is separated by commas; a quoted field may contain commas, line ends and doubled quotes. .tsv is separated by
    tabs and its quotes are plain characters, as in GLUE's files, unless every name in the header line is in quotes
    (`"text"\\t"label"`): then its fields are quoted as in CSV.

    Raises:
        DataError: not UTF-8, a repeated column name, or a quote that is not closed; with path and line.
    """
    csv.field_size_limit(MAX_FIELD_CHARS)  # the default, 128 KiB, is less than a long document
    tsv = path.suffix.lower() == ".tsv"
    quoted = not tsv or _has_quoted_header(path)
    dialect = csv.excel_tab if tsv else csv.excel
    reader = csv.reader(text_lines(path), dialect, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
    rule = f" (quotes are {'quotes' if quoted else 'plain characters'} here, as in the header line)" if tsv else ""
    name, header = printable(str(path)), None
    while True:
        line = reader.line_num + 1  # the next record starts here
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            hint = " A quote may be opened here and never closed." if quoted else ""
            hint = OLD_MAC if "new-line character" in str(e) else hint
            raise DataError(f"{name}:{line}: {e}.{hint}") from e
        blank = not "".join(fields).strip()
        if header is None and not blank:
            header = fields
            if repeated := sorted({column for column in header if header.count(column) > 1}):
                names = ", ".join(repr(printable(column)) for column in repeated)
                raise DataError(f"{name}:{line}: the header has {names} more than once.")
        elif header and len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True)), ""
        elif header and (len(fields) > 1 or not blank):
            yield line, {}, f"{len(fields)} fields, the header has {len(header)}{rule}{separator_hint(header)}"


def _has_quoted_header(path: Path) -> bool:
    """Whether every column name in the header line of a .tsv file is in quotes."""
    header = next((line for line in text_lines(path) if line.strip()), "")
    return all(re.fullmatch('".*"', column) for column in header.rstrip("\r\n").split("\t"))


def separator_hint(columns: Sequence[str]) -> str:
    """How to convert a file whose header is a single column because it uses another separator; "" for any other file."""
    separator = re.search(r"[;|\t,]", columns[0]) if len(columns) == 1 else None
    if not separator:
        return ""
    way = {",": "name it .csv", "\t": "name it .tsv"}.get(separator[0]) or (
        f"convert it: python -c 'import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, "
        f'delimiter="{separator[0]}"))\' < OLD > NEW'
    )
    return f". Its columns seem to be separated by {format_value(separator[0])}: {way}"
