"""How a command ends after an error: the message on stderr and the exit code."""

import errno
import os
import re
import select
import sys
import traceback

from lora_ft.core.errors import EXIT_BROKEN_PIPE, EXIT_BUG, EXIT_OUT_OF_MEMORY, FilesError, UserError, is_out_of_memory
from lora_ft.core.messages import info, printable

# Errors of the user's disk and folders, not bugs.
USER_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
}
LOWER_MEMORY = (
    "these settings lower it: train.micro_batch_tokens, data.max_length, train.gradient_checkpointing: true, "
    "model.dtype: bfloat16, adapter.rank, generation.batch_size"
)


def report_error(error: Exception, debug: bool) -> int:
    """Print what went wrong on stderr, with the traceback if `debug`; returns the exit code."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return EXIT_BROKEN_PIPE  # `lora-ft eval | head`: the reader is gone
    if debug:
        traceback.print_exception(error)
    if isinstance(error, UserError):
        info(str(error))
        return error.exit_code
    if is_out_of_memory(error):
        from lora_ft.core.machine import free_memory

        free = free_memory()
        info(f"out of memory: {_refused_allocation(error)}; {free.size / 2**20:,.0f} MiB {free.where}; {LOWER_MEMORY}")
        return EXIT_OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in USER_ERRNOS:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
        info(f"{name}: {error.strerror}; free some space, or use another folder")
        return FilesError.exit_code
    hint = "" if debug else "; run again with --debug for the traceback"
    info(f"this is a bug: {type(error).__name__}: {printable(str(error), 500)}{hint}")
    return EXIT_BUG


def _refused_allocation(error: Exception) -> str:
    """The size that was refused. torch's GPU allocator explains itself; its CPU allocator names a number of bytes."""
    text = str(error).strip()
    if size := re.search(r"allocate (\d+) bytes", text):
        return f"cannot allocate {size[1]} bytes ({int(size[1]) / 2**20:,.1f} MiB) in one piece"
    return f"an allocation was refused ({text})" if text else "an allocation was refused"


def _stdout_is_closed() -> bool:
    """Whether nobody reads the pipe behind stdout any more; then stdout is redirected to nowhere."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        closed = bool(poll.poll(0))
        if closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes into it at exit
        return closed
    except (OSError, ValueError, AttributeError):  # stdout is not a file, or the system has no poll
        return False
