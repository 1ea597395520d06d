"""How a command ends: what is said on stderr and which exit code, and how quiet other libraries are on the way."""

import errno
import os
import re
import resource
import select
import sys
from pathlib import Path

from lora_ft.core.errors import UserError, is_memory
from lora_ft.core.messages import info, printable

BUG, FILES, MEMORY, INTERRUPTED, PIPE_CLOSED = 1, 6, 7, 130, 141
# What the operating system refuses for the user's disk and folders, not for a mistake of ours.
REFUSED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
}
LOWER_MEMORY = (
    "these lower it: train.micro_batch_tokens, data.max_length, train.gradient_checkpointing: true, "
    "model.dtype: bfloat16, adapter.rank, generation.batch_size"
)


def report_error(error: Exception, debug: bool) -> int:
    """Say what went wrong, on stderr, and give the exit code for it."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return PIPE_CLOSED  # `lora-ft eval | head`: the reader has had enough
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, UserError):
        info(str(error))
        return error.exit_code
    if is_memory(error):
        info(f"out of memory: {_asked_for(error)}; {_free_memory()}{LOWER_MEMORY}")
        return MEMORY
    if isinstance(error, OSError) and error.errno in REFUSED:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
        info(f"{name}: {error.strerror}; free space, or give another folder")
        return FILES
    hint = "" if debug else "; run again with --debug for the traceback"
    info(f"this is a bug: {type(error).__name__}: {printable(str(error), 500)}{hint}")
    return BUG


def _asked_for(error: Exception) -> str:
    """What was refused. torch's GPU allocator says all there is to say; its CPU allocator a number of bytes."""
    text = str(error).strip()
    if size := re.search(r"allocate (\d+) bytes", text):
        return f"{size[1]} bytes ({int(size[1]) / 2**20:,.1f} MiB) asked for in one piece"
    return f"an allocation was refused ({text})" if text else "an allocation was refused"


def _free_memory() -> str:
    """What this machine and the process's own limit leave, as a clause; empty where the system doesn't tell."""
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, KeyError):
        return ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit - used < free:
        return f"{max(0, limit - used) / 2**20:,.0f} MiB left of this process's limit (ulimit -v) of {limit / 2**20:,.0f} MiB; "
    return f"{free / 2**20:,.0f} MiB are free on this machine; "


def _stdout_is_closed() -> bool:
    """Whether the pipe that stdout goes to has no reader any more; then nothing more is written there."""
    try:
        stdout = sys.stdout.fileno()
        poll = select.poll()
        poll.register(stdout, 0)
        if not poll.poll(0):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # else the exit flushes into it again
    except (OSError, ValueError, AttributeError):  # no file below it, or a system without poll
        return False
    return True


def silence_libraries() -> None:
    """Before the first import of the big libraries: advice off, bars only for people. The environment can overrule."""
    bars = sys.stderr.isatty()
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        if not bars:  # tqdm's is a default that a bar's own `disable=None`, as ours have it, beats
            os.environ.setdefault(name, "1")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights, which takes a second
