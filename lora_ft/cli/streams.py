"""The standard streams of a process: UTF-8 in any locale, and closed, full or broken ones."""

import errno
import locale
import os
import select
import sys
from contextlib import suppress

from lora_ft.core.disk import WINDOWS

NAMES = ("stdin", "stdout", "stderr")  # by file descriptor


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode, unless the locale's encoding is UTF-8 already.

    Libraries too then use UTF-8 for files and their names. What the terminal can't show is printed escaped.
    """
    encodings = {sys.getfilesystemencoding(), locale.getpreferredencoding(False)}
    if {name.lower().replace("-", "") for name in encodings} == {"utf8"} or WINDOWS:
        return
    if os.environ.get("PYTHONUTF8") == "1" or not sys.executable:  # it was of no use
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", None) or "ascii")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def open_streams() -> None:
    """Put the null device in the place of closed streams, and let no character stop reading or printing."""
    for number, name in enumerate(NAMES):
        try:
            os.fstat(number)
        except OSError:  # closed: a file opened later would get its number, and messages would be written into it
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for name in NAMES:
        encoding = {"encoding": "utf-8"} if name == "stdin" else {}
        getattr(getattr(sys, name), "reconfigure", lambda **_: None)(errors="backslashreplace", **encoding)


def unwritable() -> tuple[str, OSError] | None:
    """The first of stdout and stderr that what was printed can't be written to, and why; None if both can be.

    They then lead nowhere: else Python would try again when it exits, and fail with code 120.
    """
    found = None
    for name in NAMES[:0:-1]:
        stream = getattr(sys, name)
        with suppress(ValueError, AttributeError):  # closed by a library, or no file
            try:
                stream.flush()
                if not _nobody_reads(stream.fileno()):
                    continue
                problem: OSError = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            except OSError as e:
                gone = WINDOWS and e.errno == errno.EINVAL  # its answer of a pipe that nobody reads
                problem = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) if gone else e
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
            found = name, problem
    return found


def _nobody_reads(number: int) -> bool:
    """Whether this is a pipe whose reader is gone; a large write that failed leaves nothing to flush."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
