"""What the file system below a path refuses: space, errors of writing, and operations that some mounts lack."""

import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ft.core.errors import FilesError, system_error

# What mounts without permissions to set or anything to flush answer (some network and FUSE file systems)
UNSUPPORTED = {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
WINDOWS = sys.platform == "win32"
RENAME_SECONDS = 2.0  # on Windows; a virus scanner or an indexer has a new file open for less


@contextmanager
def os_errors_as_files_error(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the system's errors while `path` is written into a FilesError that names it. Raises as `write_file`."""
    try:
        yield
    except Exception as e:
        number = system_error(e)
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            figures = f"{needed} bytes needed, {free} free" if needed else f"{free} bytes free"
            raise FilesError(f"{path}: the disk is full ({figures}). Free some space and run again.") from e
        if number is not None:
            hint = " Does another program have it open?" if WINDOWS and number == errno.EACCES else ""
            raise FilesError(f"{path}: can't be written ({os.strerror(number)}).{hint}") from e
        raise


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk, where the file system can.

    Windows cannot open folders, and flushes only files open to write.
    """
    with where_supported():
        handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def rename(source: Path, target: Path) -> Path:
    """Rename a file or folder, in place of a file there; returns `target`. Raises OSError.

    Windows refuses while any program has it open: tried again for RENAME_SECONDS.
    """
    until = time.monotonic() + RENAME_SECONDS
    while True:
        try:
            return source.replace(target)
        except PermissionError:
            if not WINDOWS or time.monotonic() > until:
                raise
            time.sleep(0.05)


@contextmanager
def where_supported() -> Iterator[None]:
    """Ignore that a mount has no permissions to set, or nothing to flush (some network and FUSE file systems)."""
    try:
        yield
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise
