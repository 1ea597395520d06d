"""Errors that a user can fix, one class per exit code, and the other exit codes. Any other exception is a bug.

A message names the problem, the place (file and line, setting or tensor) and the way out.
"""

import errno
import os
import re

LIBRARY_VARIABLE = re.compile(
    "(?!.*_VERBOSITY$)(HF|HUGGING|TRANSFORMERS|DATASETS|ACCELERATE|(PY)?TORCH|TQDM|FSDP|LOCAL_|MASTER_|SLURM|OMPI|PMI|MPI)"
)
ORDINARY = re.compile(r"[-\d.]*|true|false|yes|no|on|off|none", re.IGNORECASE)
EXIT_BUG, EXIT_OUT_OF_MEMORY = 1, 7
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells count


class UserError(Exception):
    """Base class of the errors that are reported as a message instead of a traceback."""

    exit_code = EXIT_BUG

    def __init_subclass__(cls, exit_code: int) -> None:
        cls.exit_code = exit_code

    def add_name(self, name: str) -> None:
        """Begin the message with the name of the run that it is about."""
        self.args = (f"{name}: {self}",)


class ConfigError(UserError, exit_code=2):
    """An invalid config file or command line."""


class DataError(UserError, exit_code=3):
    """Invalid training or evaluation data."""


class ModelError(UserError, exit_code=4):
    """A model, tokenizer or adapter that is missing, damaged or does not fit."""


class NumbersError(UserError, exit_code=5):
    """NaN or inf in the loss, a gradient or a score."""


class FilesError(UserError, exit_code=6):
    """Files, disk space, locks and checkpoints."""


def system_error(error: BaseException) -> int | None:
    """The system's error number behind `error`: an OSError's, or the one that safetensors (Rust) wraps in its text."""
    if isinstance(error, OSError):
        return error.errno
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    return int(wrapped[1]) if wrapped else None


def variable_behind(error: BaseException) -> str | None:
    """NAME=value of the environment variable, of a library, whose value a library's error quotes; None if none.

    Numbers and flags are not counted: they are in other errors too.
    """
    for name, value in os.environ.items() if isinstance(error, ValueError | RuntimeError) else ():
        quoted = rf"(['\"]|: |value ){re.escape(value)}(?![\w/])"
        if (
            LIBRARY_VARIABLE.match(name)
            and not ORDINARY.fullmatch(value)
            and re.search(quoted, str(error), re.IGNORECASE)
        ):
            return f"{name}={value}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` reports a refused allocation, by name and text: libraries have no common class for it."""
    # torch's CPU allocator raises a plain RuntimeError, safetensors an error of its own
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    refused = any(part in text for part in ("allocate memory", "bad_alloc", "start new thread", "os error 12"))
    return refused or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
