"""What can go wrong for a user, one class per exit code. Everything else is a bug (exit 1).

A message says what is wrong, where (file and line, field or tensor), and what to do about it.
"""


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


class MemoryShortage(UserError):
    """No memory for the model or a step."""

    exit_code = 7
