"""How a command ends after an error: the message on stderr and the exit code."""

import errno
import os
import re
import traceback

from lora_ft.cli.streams import unwritable
from lora_ft.core.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_OUT_OF_MEMORY,
    ConfigError,
    FilesError,
    UserError,
    is_out_of_memory,
    system_error,
    variable_behind,
)
from lora_ft.core.messages import first_line, info, printable

WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space, or use another folder."),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Check its permissions and those of its folder."),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files: ulimit -n."),
    errno.EROFS: "Use another folder.",
}
LOWER_MEMORY = (
    "these settings lower it: train.micro_batch_tokens, data.max_length, train.gradient_checkpointing: true, "
    "model.quantization, adapter.rank, generation.batch_size"
)


def report_error(error: Exception, debug: bool) -> int:
    """Print what went wrong on stderr, with the traceback if `debug`; returns the exit code."""
    if isinstance(error, OSError) and (failed := unwritable()):
        stream, why = failed
        if isinstance(why, BrokenPipeError):
            return EXIT_BROKEN_PIPE  # `lora-ft eval | head`: the reader is gone
        error = FilesError(f"{stream}: can't be written ({why.strerror}). Free some space, or redirect it elsewhere.")
    if debug:
        traceback.print_exception(error)
    if variable := variable_behind(error):
        error = ConfigError(
            f"{variable} in the environment: not usable ({first_line(error)}). Correct it, or unset it."
        )
    if isinstance(error, UserError):
        info(str(error))
        return error.exit_code
    if is_out_of_memory(error):
        from lora_ft.core.machine import free_memory

        free = free_memory()
        info(f"out of memory: {_refused_allocation(error)}; {free.size / 2**20:,.0f} MiB {free.where}; {LOWER_MEMORY}")
        return EXIT_OUT_OF_MEMORY
    number = system_error(error)
    if number and number != errno.ENOENT:  # of the user's disk and folders, not a bug
        name = getattr(error, "filename", None)
        name = os.fsdecode(name) if isinstance(name, str | bytes) else "a file or stream"
        info(f"{name}: {os.strerror(number)}. {WAYS_OUT.get(number, 'Check the disk, or use another folder.')}")
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
