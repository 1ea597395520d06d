"""Paths as users give them: `~`, files that are no plain files, and a place for temporary files."""

import errno
import os
import re
import stat
import tempfile
from pathlib import Path

from lora_ft.core.errors import FilesError, UserError
from lora_ft.core.messages import format_bytes, printable
from lora_ft.core.names import with_slashes

HOLLOW_BYTES, HOLLOW_SHARE = 2**30, 16  # a file from this size on, of which one part in so many was ever written
SPECIAL = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}


def local_path(name: str) -> Path:
    """The path that `name` names, as any system writes it. A `~` without a home folder stays, so that messages show it."""
    return Path(os.path.expanduser(with_slashes(name)))


def special_kind(path: Path) -> str:
    """Whether `path`, through links, is "a pipe", "a device" or "a socket"; "" for anything else, or if that can't be known."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return next((kind for test, kind in SPECIAL.items() if test(mode)), "")


def refuse_special(path: Path, error: type[UserError]) -> None:
    """Raise `error` if `path` is a pipe, a device or a socket: reading one may never end, and replacing one breaks it."""
    if kind := special_kind(path):
        raise error(f"{printable(str(path))}: {kind}, not a file. Give a file; copy the content to one if necessary.")


def refuse_hollow(path: Path, error: type[UserError]) -> None:
    """Raise `error` for a sparse file of gigabytes, of which almost nothing was ever written: reading it takes minutes.

    Such a file is an interrupted download or copy, or made to keep this machine busy.
    """
    try:
        size, written = path.stat().st_size, _written_bytes(path)
    except (OSError, ValueError):
        return
    if size >= HOLLOW_BYTES and written < size // HOLLOW_SHARE:
        raise error(
            f"{printable(str(path))}: {format_bytes(size)}, of which only {format_bytes(written)} were ever written; the rest "
            "is empty. Copy or download it again."
        )


def _written_bytes(path: Path) -> int:
    """The bytes of a file that are not holes, as far as a large file goes; its size where a system can't tell."""
    found = path.stat()
    if not hasattr(os, "SEEK_DATA"):  # Windows
        return found.st_size
    if found.st_size < HOLLOW_BYTES or found.st_blocks * 512 >= found.st_size // HOLLOW_SHARE:
        return found.st_size  # the usual file; some network file systems count no blocks, so ask for the holes as well
    written = end = 0
    with path.open("rb") as file:
        while end < found.st_size and written < found.st_size // HOLLOW_SHARE:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:  # no more data
                    break
                raise
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            written += end - start
    return written


def refuse_not_utf8(path: Path, error: type[UserError]) -> None:
    """Raise `error` if the name of a file or folder is not UTF-8: the libraries for tensors and Parquet can't open it."""
    if re.search("[\ud800-\udfff]", str(path)):
        raise error(f"{printable(str(path))}: its name is not valid UTF-8, so libraries could not open it. Rename it.")


def temporary_folder() -> tempfile.TemporaryDirectory:
    """A new temporary folder. Raises FilesError if no place for one can be written."""
    try:
        return tempfile.TemporaryDirectory(prefix="lora-ft-", ignore_cleanup_errors=True)
    except OSError as e:
        tried = os.environ.get("TMPDIR") or "/tmp"
        why = e.strerror or e
        raise FilesError(
            f"no temporary folder can be written ({tried}: {why}). Set TMPDIR to a folder that can."
        ) from e
