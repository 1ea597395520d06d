"""CSV and TSV files: records, each with the line it starts on."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lora_ft.core.errors import DataError
from lora_ft.core.messages import format_value, listed, printable
from lora_ft.data.files import DEFAULT, FileFormat, kind, text_lines

MAX_FIELD_CHARS = 16 * 2**20  # ends a quote that is never closed before it has swallowed a large file
OLD_MAC = " Its lines end in CR alone, as on old Macs: tr '\\r' '\\n' < OLD > NEW."
NO_HEADER = " If it has no header line, name its columns: data.format: {header: [prompt, completion]}."
SEPARATORS = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t", ";", ",", "|")}  # the first that the header line has

Record = tuple[int, dict[str, str], str]  # line it starts on, values by column, the problem if it has no values


def read_delimited(path: Path, format: FileFormat = DEFAULT, hints: bool = True) -> Iterator[Record]:
    """The records of a .csv or .tsv file. hints: say with a problem which format would read the file, by trying some.

    Fields are separated by `format.separator`, by default the comma of a .csv and the tab of a .tsv, or the first of
    `SEPARATORS` that the header line has. A quoted field may contain separators, line ends and doubled quotes. In a .tsv
    quotes are plain characters, as in GLUE's files, unless every name in the header line is in quotes
    (`"text"\t"label"`) or `format` names a quote: then its fields are quoted as in CSV.

    Raises:
        DataError: not text, a repeated column name, or a quote that is not closed; with path and line.
    """
    csv.field_size_limit(MAX_FIELD_CHARS)  # the default, 128 KiB, is less than a long document
    first = next((line for line in text_lines(path, format.encoding) if line.strip()), "")
    separator = format.separator or _separator(first, kind(path))
    tsv, quote = separator == "\t", format.quote
    quoted = quote != "none" if quote else not tsv or _has_quoted_header(first)
    reader = csv.reader(
        text_lines(path, format.encoding),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        quotechar=quote if quoted and quote else '"',
        escapechar=format.escape,
        strict=True,
    )
    rule = f" (quotes are {'quotes' if quoted else 'plain characters'} here)" if tsv else ""
    name, header, hint = printable(str(path)), list(format.header) if format.header else None, None
    while True:
        line = reader.line_num + 1  # the next record starts here
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            way = _quote_hint(path, format) if quoted and hints else ""
            way = OLD_MAC if "new-line character" in str(e) else way
            raise DataError(f"{name}:{line}: {e}.{way}") from e
        blank = not "".join(fields).strip()
        if header is None and not blank:
            header = fields
            if repeated := sorted(column for column, count in Counter(header).items() if count > 1):
                names = listed([repr(printable(column)) for column in repeated], 5)
                raise DataError(f"{name}:{line}: the header has {names} more than once.{NO_HEADER}")
        elif header and len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True)), ""
        elif header and (len(fields) > 1 or not blank):
            tried = hints and hint is None
            hint = _separator_hint(path, format._replace(separator=separator), first) if tried else ""
            yield line, {}, f"{len(fields)} fields, the header has {len(header)}{rule}{hint}"


def _separator(header: str, suffix: str) -> str:
    """The separator of a file with this header line; names in quotes may contain others."""
    bare = re.sub('"[^"]*"', "", header)
    return next((c for c in SEPARATORS[suffix] if c in bare), SEPARATORS[suffix][0])


def _has_quoted_header(header: str) -> bool:
    """Whether every column name in the header line of a .tsv file is in quotes."""
    return all(re.fullmatch('".*"', column) for column in header.rstrip("\r\n").split("\t"))


def _separator_hint(path: Path, format: FileFormat, header: str) -> str:
    """The setting that reads a file whose rows do not have the fields of its header line; "" if no separator does."""
    for other in SEPARATORS[".csv"]:
        if other in header and other != format.separator and _reads(path, format._replace(separator=other)):
            return f". Its separator seems to be {format_value(other)}: set data.format: {{separator: {format_value(other)}}}"
    return ""


def _quote_hint(path: Path, format: FileFormat) -> str:
    """The setting that reads a file whose quotes cannot be read."""
    if format.escape is None and _reads(path, format._replace(escape="\\")):
        return ' Quotes inside its fields are written \\": set data.format: {escape: "\\\\"}.'
    if format.quote is None and _reads(path, format._replace(quote="none")):
        return " Its quotes are plain characters: set data.format: {quote: none}."
    return " A quote may be opened here and never closed."


def _reads(path: Path, format: FileFormat) -> bool:
    """Whether a file is read without a problem in this format."""
    try:
        return not any(problem for _, _, problem in read_delimited(path, format, hints=False))
    except DataError:
        return False
