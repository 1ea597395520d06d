"""Data files: which ones a source names, how they are written, and their lines of text."""

import codecs
import glob
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TypeVar

import pyarrow

from lora_ft.core.errors import DataError
from lora_ft.core.messages import listed, printable
from lora_ft.core.names import COMPRESSED_SUFFIXES, DATA_SUFFIXES, nearest
from lora_ft.core.paths import local_path, refuse_hollow, refuse_special

TEXT_FILE = (
    "Make one row of it: python -c 'import json, sys; print(json.dumps({\"text\": sys.stdin.read()}))' < OLD > NEW.jsonl, "
    'and train on it with data.text: "{text}" and data.long_text: split. If each line is a row of its own: python -c \'import '
    'json, sys; [print(json.dumps({"text": line.rstrip()})) for line in sys.stdin if line.strip()]\' < OLD > NEW.jsonl. If it '
    "is a table, end its name in .csv or .tsv."
)
TEXT_FOLDER = (
    " Make one row of each text file, with the name of its folder: python -c 'import json, pathlib, sys; "
    '[print(json.dumps({"text": p.read_text(), "label": p.parent.name})) for p in '
    'sorted(pathlib.Path(sys.argv[1]).rglob("*.txt"))]\' FOLDER > NEW.jsonl'
)
CONVERSIONS = {suffix: "Unpack it first." for suffix in (*COMPRESSED_SUFFIXES, ".xz", ".zip", ".tar")}
CONVERSIONS |= {suffix: "Save it as .csv." for suffix in (".xlsx", ".xls", ".ods")}
CONVERSIONS |= {suffix: "Read it with `datasets` and write it with to_parquet." for suffix in (".arrow", ".feather")}
CONVERSIONS |= {".txt": TEXT_FILE, ".md": TEXT_FILE}
MAX_SAMPLE_BYTES = 2**20
PART, MAX_LINE = (
    2**20,
    2**28,
)  # bytes (characters, in other encodings than UTF-8); of a .json file, which is one value, all of it


Line = TypeVar("Line", str, bytes)


class FileFormat(NamedTuple):
    """How text files are written (`data.format`); None: the default. header: the columns of a file without a header line."""

    encoding: str = "utf-8"
    separator: str | None = None
    quote: str | None = None
    escape: str | None = None
    header: tuple[str, ...] | None = None


DEFAULT = FileFormat()


class LongLine(DataError, exit_code=DataError.exit_code):
    """A line of more than MAX_LINE."""


def file_format(settings: Mapping[str, Any] | None) -> FileFormat:
    """The format of a config's `data.format`."""
    return FileFormat(**(settings or {}))


def data_files(source: str) -> list[Path]:
    """The files that a local source names: a file, all data files of a folder, or those that a pattern (*) matches.

    Raises:
        DataError: no such file, an unsupported kind of file, or a folder whose files are not one data set.
    """
    path = local_path(source)
    if path.is_dir():
        return _in_folder(path)
    if not path.exists() and glob.has_magic(source):
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not files:
            raise DataError(f"{printable(source)}: matches no file. Paths are relative to the current folder.")
    else:
        files = [path]
    for file in files:
        _check_file(file)
    return files


def kind(path: Path) -> str:
    """The suffix of DATA_SUFFIXES that tells how a file is read, without that of a compression; "" for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] and suffixes[-1] in COMPRESSED_SUFFIXES
    suffix = (suffixes[-2:-1] if packed else suffixes[-1:] or [""])[:1]
    known = bool(suffix) and suffix[0] in DATA_SUFFIXES and not (packed and suffix[0] == ".parquet")
    return suffix[0] if known else ""


def _in_folder(folder: Path) -> list[Path]:
    """The data files directly in a folder, if they look like the pieces of one data set."""
    files, name = sorted(p for p in folder.iterdir() if p.is_file() and kind(p)), printable(str(folder))
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        raise DataError(f"{name}: a folder of `save_to_disk`. {CONVERSIONS['.arrow']}")
    if (folder / "config.json").is_file():
        raise DataError(f"{name}: a model's folder, not a data set.")
    names = printable(listed([p.name for p in files], 5), 400)
    if not files:
        below = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(kind(f) for f in p.iterdir()))
        hint = f" Its folders do: {printable(listed(below, 5))}." if below else TEXT_FOLDER * _has_text_files(folder)
        raise DataError(f"{name}: a folder without a data file ({', '.join(DATA_SUFFIXES)}).{hint}")
    held_out = [
        p for p in files if re.search(r"(^|[^a-z])(test|valid|validation|val|dev|eval)([^a-z]|$)", p.name.lower())
    ]
    if len({kind(p) for p in files}) > 1 or 0 < len(held_out) < len(files):
        pattern = f"{name}/train*" if held_out else f"{name}/*{kind(files[0])}"
        raise DataError(
            f"{name}: a folder whose files may not be one data set: {names}. Name a file, a list of them, or a pattern "
            f"such as {pattern}"
        )
    return files


def _has_text_files(folder: Path) -> bool:
    return any(folder.glob("*.txt")) or any(folder.glob("*/*.txt"))


def _check_file(path: Path) -> None:
    name = printable(str(path))
    refuse_special(path, DataError)
    refuse_hollow(path, DataError)
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else None
        hint = f" Did you mean {printable(str(path.parent / near))}?" if near else ""
        raise DataError(f"{name}: no such file. Paths are relative to the current folder.{hint}")
    if not kind(path):
        hint = f" {CONVERSIONS[path.suffix.lower()]}" if path.suffix.lower() in CONVERSIONS else ""
        raise DataError(
            f"{name}: not a supported data file, which ends in {', '.join(DATA_SUFFIXES)}, or in one of these and "
            f"{' or '.join(COMPRESSED_SUFFIXES)}.{hint}"
        )


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, decompressed according to its name. Reading raises DataError if the compressed data is damaged."""
    if path.suffix.lower() not in COMPRESSED_SUFFIXES:
        return path.open("rb")
    return io.BufferedReader(_Unpacked(path))


class _Unpacked(io.RawIOBase):
    """A compressed file through Arrow, with its errors as DataError."""

    def __init__(self, path: Path):
        self.path, self.stream = path, pyarrow.input_stream(str(path), compression="detect")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except (OSError, pyarrow.ArrowException) as e:
            raise DataError(f"{printable(str(self.path))}: damaged compressed file: {printable(str(e))}.") from e
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def text_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a text file with their line ends (only `\\n` ends a line), without a byte-order mark.

    Raises:
        DataError: a byte that is not text in `encoding`, or is NUL; with path and line, in UTF-8 also its position. A line
            longer than MAX_LINE.
    """
    name = printable(str(path))
    with open_bytes(path) as file:
        if codecs.lookup(encoding).name != "utf-8":
            yield from _decoded_lines(file, encoding, name)
            return
        for number, raw in enumerate(_bounded(file, name, b"\0"), 1):
            skipped = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            try:
                line, bad = raw[skipped:].decode(), raw.find(b"\0")
            except UnicodeDecodeError as e:
                bad = skipped + e.start
            if bad >= 0:
                likely = likely_encoding(path)
                way = f"set data.format: {{encoding: {likely}}} if it is {likely}, or " if likely != "utf-8" else ""
                raise DataError(
                    f"{name}:{number}: byte {bad + 1} of the line (0x{raw[bad]:02x}) is not UTF-8 text: {way}"
                    f"save the file as UTF-8{f': iconv -f {likely} -t UTF-8 < OLD > NEW' if way else ''}."
                )
            yield line


def _bounded(file: IO[Line], name: str, nul: Line) -> Iterator[Line]:
    """The lines of a file; one with a NUL, which is an error, may end early: a sparse file is one line of gigabytes."""
    number = 0
    while line := file.readline(PART):
        number, parts, size = number + 1, [line], len(line)
        while len(parts[-1]) == PART and nul not in parts[-1] and (part := file.readline(PART)):
            parts.append(part)
            if (size := size + len(part)) > MAX_LINE:
                raise LongLine(
                    f"{name}:{number}: a line of more than {MAX_LINE / 2**20:,.0f} MiB, the limit for one row."
                )
        yield line if len(parts) == 1 else line[:0].join(parts)


def _decoded_lines(file: BinaryIO, encoding: str, name: str) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(_bounded(io.TextIOWrapper(file, encoding, newline="\n"), name, "\0"), 1):
            if "\0" in line:
                raise DataError(f"{name}:{number}: a NUL character: not text in {encoding} (data.format).")
            yield line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as e:
        raise DataError(f"{name}:{number + 1}: not text in {encoding} (data.format): {printable(str(e))}.") from e


def likely_encoding(path: Path) -> str:
    """The encoding in which the first MiB of a file is text: utf-8, utf-16, cp1252, or latin1 if it is none of them.

    Its name is one that both Python and iconv know.
    """
    with open_bytes(path) as file:
        raw = file.read(MAX_SAMPLE_BYTES)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in raw:
        even, odd = raw[::2].count(0), raw[1::2].count(0)
        return "utf-16le" if odd > even else "utf-16be" if even > odd else "utf-8"
    for encoding in ("utf-8", "cp1252"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(raw)
            return encoding
        except UnicodeDecodeError:
            continue
    return "latin1"
