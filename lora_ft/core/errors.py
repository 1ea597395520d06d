"""What can go wrong for a user, one class per exit code. Everything else is a bug (exit 1).

A message says what is wrong, where (file and line, field or tensor), and what to do about it.
"""

import errno


class UserError(Exception):
    """Base of the errors that are answered with a message instead of a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """The config file or the command line."""

    exit_code = 2


class DataError(UserError):
    """Training or evaluation data."""

    exit_code = 3


class ModelError(UserError):
    """Model, tokenizer or adapter."""

    exit_code = 4


class NumbersError(UserError):
    """NaN or inf in the loss or a gradient."""

    exit_code = 5


class FilesError(UserError):
    """Files, disk, locks and checkpoints."""

    exit_code = 6


def is_memory(error: BaseException) -> bool:
    """Whether an allocation was refused. By name and text: of torch's CPU allocator it is a plain RuntimeError, of
    safetensors one of its own."""
    text = str(error).lower()
    refused = any(t in text for t in ("allocate memory", "bad_alloc", "start new thread", "os error 12"))
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or refused
