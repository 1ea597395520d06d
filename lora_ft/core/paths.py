"""Paths as users give them: `~`, files that are no plain files, and a place for temporary files."""

import os
import stat
import tempfile
from pathlib import Path

from lora_ft.core.errors import FilesError, UserError
from lora_ft.core.messages import printable
from lora_ft.core.names import with_slashes

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
