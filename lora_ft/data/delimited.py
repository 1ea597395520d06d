"""CSV and TSV with a header: records with the line they begin on, strictly read."""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_ft.core.errors import DataError
from lora_ft.core.messages import format_value, printable

FIELD_LIMIT = 16 * 2**20  # characters; a quote never closed stops here and not at the end of a large file
OLD_MAC = " Its lines end in CR alone, as on old Macs: tr '\\r' '\\n' < OLD > NEW."
# A record in which every quote is accounted for: a field with a quote is quoted as a whole, quotes inside are doubled.
QUOTED_FIELD = r'(?:"[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)'
QUOTED_RECORD = re.compile(rf"({QUOTED_FIELD})((?:\t{QUOTED_FIELD})*)(?:\r?\n)?")

Record = tuple[int, dict[str, str], str]  # the line it begins on, its columns, why it has none


def text_lines(path: Path) -> Iterator[str]:
    """A UTF-8 file's lines with their ends (only `\\n` ends one), a byte-order mark removed.

    Raises:
        DataError: path:line and byte of what isn't UTF-8, or of a NUL.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            skipped = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            try:
                line = raw[skipped:].decode()
                bad = line.find("\0")
            except UnicodeDecodeError as e:
                bad = e.start
            if bad >= 0:
                what = f"byte {bad + skipped + 1} of the line (0x{raw[bad + skipped]:02x}) isn't UTF-8 text"
                other = "UTF-16" if b"\0" in raw else "LATIN1"
                raise DataError(
                    f"{printable(str(path))}:{number}: {what}. Save the file as UTF-8; if it looks like {other}, "
                    f"iconv -f {other} -t UTF-8 < OLD > NEW."
                )
            yield line


def read_csv(path: Path) -> Iterator[Record]:
    """The records of a comma-separated file with a header; quoted fields may span lines."""
    return _records(path, ",", quoted=True)


def read_tsv(path: Path) -> Iterator[Record]:
    """The records of a tab-separated file with a header, quoted if `tsv_is_quoted`."""
    return _records(path, "\t", quoted=tsv_is_quoted(path))


def tsv_is_quoted(path: Path) -> bool:
    """Whether a tab-separated file's quotes are CSV's, or plain characters as in GLUE's files.

    A CSV writer quotes every field that holds a quote and doubles those inside. So a file is quoted if all its quotes
    are accounted for that way and every record has the header's number of fields; one quote that isn't makes the
    whole file verbatim. The exception: some record spans lines, yet every line by itself has the header's number of
    fields (two or more). Such lines are records, between a quote that opens one and a quote that ends another.
    """
    fields, lines_fit, spans, record, start_quotes = 0, True, False, "", 0
    for line in text_lines(path):
        if not record and not line.strip("\r\n"):
            continue
        fields = fields or line.count("\t") + 1
        lines_fit = lines_fit and line.count("\t") + 1 == fields
        spans = spans or bool(record)
        record += line
        start_quotes += line.count('"')
        if start_quotes % 2:  # inside a quoted field, if quotes are quotes
            if len(record) > FIELD_LIMIT:
                return False
            continue
        if start_quotes:
            match = QUOTED_RECORD.fullmatch(record)
            if not match or len(re.findall(rf"\t{QUOTED_FIELD}", match[2])) + 1 != fields:
                return False
        record, start_quotes = "", 0
    return not record and not (spans and lines_fit and fields > 1)


def _records(path: Path, delimiter: str, quoted: bool) -> Iterator[Record]:
    csv.field_size_limit(FIELD_LIMIT)  # the module's own 128 Ki is less than a long document
    lines = text_lines(path)
    if quoted:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    name, header = printable(str(path)), None
    kind = {",": "", "\t": f" (quotes are {'quotes' if quoted else 'plain characters'} here)"}[delimiter]
    while True:
        line = reader.line_num + 1  # where the next record begins
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            hint = " A quote that opens here may never be closed." if quoted else ""
            hint = OLD_MAC if "new-line character" in str(e) else hint
            raise DataError(f"{name}:{line}: {e}.{hint}") from e
        if header is None:
            if "".join(fields).strip():
                header = fields
                _check_header(header, f"{name}:{line}")
        elif len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True)), ""
        elif len(fields) > 1 or "".join(fields).strip():  # a blank line is no record
            yield line, {}, f"{len(fields)} fields, the header has {len(header)}{kind}{separator_hint(header)}"


def _check_header(header: list[str], where: str) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{where}: the header has {', '.join(repr(printable(c)) for c in twice)} more than once.")


def separator_hint(columns: Sequence[str]) -> str:
    """What to do about a header that is one column because its names are separated otherwise; "" if it isn't."""
    only, *others = columns or ("",)
    found = re.search(r"[;|\t,]", only)
    if others or not found:
        return ""
    way = {",": "name it .csv", "\t": "name it .tsv"}.get(found[0]) or (
        f"convert it: python -c 'import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, "
        f'delimiter="{found[0]}"))\' < OLD > NEW'
    )
    return f". Its columns seem to be separated by {format_value(found[0])}: {way}"
