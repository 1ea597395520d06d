"""The lock of a run's output folder: one run at a time, as far as its file system has locks."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lora_ft.core.disk import os_errors_as_files_error
from lora_ft.core.errors import FilesError
from lora_ft.core.messages import warn
from lora_ft.core.paths import refuse_special
from lora_ft.training.output import ANOTHER, check_not_a_file, remove_if_empty, remove_leftovers

LOCK, HOLDER = ".lock", ".lock.pid"
LOCK_SECONDS = 5.0  # to wait for the answer of a network file system
# What file systems without locks answer, among them NFS mounted with nolock or without its lock daemon
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINTR, errno.EINVAL}


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock `output` for this process. The folder is created if missing, and removed again if it stays empty.

    Raises:
        FilesError: it is a file, can't be written or locked, or another run holds the lock (with its pid).
    """
    check_not_a_file(output)
    for name in (LOCK, HOLDER):
        refuse_special(output / name, FilesError)
    created, lock, holder = not output.exists(), FileLock(output / LOCK, blocking=False), output / HOLDER
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
            with _seconds(LOCK_SECONDS):
                lock.acquire()
        except Timeout:
            raise FilesError(
                f"output {output}: in use by another run (pid {_read_holder(output)}). Wait for it, or use {ANOTHER}"
            ) from None
        except OSError as e:
            _remove_lock(output)
            if e.errno not in NO_LOCKS:
                raise FilesError(f"output {output}: can't be written or locked ({e.strerror}). Use {ANOTHER}") from e
            warn(f"output {output}: its file system can't lock it ({e.strerror}): make sure that no other run uses it")
        try:
            with os_errors_as_files_error(holder):
                holder.unlink(missing_ok=True)  # never written through a link
                holder.write_text(str(os.getpid()), encoding="utf-8")
            remove_leftovers(output)
            yield
        finally:
            holder.unlink(missing_ok=True)
            _remove_lock(output)  # before the release, after which a file of that name may be another run's
            lock.release()
    finally:
        if created:
            remove_if_empty(output)


def _read_holder(output: Path) -> str:
    """The pid of the process that holds the lock; it may be about to write or to remove the file."""
    try:
        return (output / HOLDER).read_text(encoding="utf-8", errors="replace") or "unknown"
    except OSError:
        return "unknown"


@contextmanager
def _seconds(limit: float) -> Iterator[None]:
    """Interrupt a system call that takes longer with InterruptedError (main thread only; not on Windows)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit, limit)  # again and again: filelock asks twice
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _remove_lock(output: Path) -> None:
    with suppress(OSError):  # Windows removes it with the release, when it is no longer open
        (output / LOCK).unlink()
