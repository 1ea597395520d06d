"""Messages to the user: on stderr, with control characters escaped."""

import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def printable(text: str, limit: int = 200, keep: str = "") -> str:
    """`text` cut at `limit` characters, with control characters other than those of `keep` shown as \\x1b and the like."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode() for c in cut
    )


def info(message: str) -> None:
    """Print a message, of one or more lines, on stderr."""
    print("\n".join(printable(line, 2000) for line in message.split("\n")), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a message marked as a warning on stderr."""
    info(f"warning: {message}")


@contextmanager
def announce_if_slow(what: str, seconds: float = 1.5) -> Iterator[None]:
    """Print what is being done if it takes longer than this."""
    timer = threading.Timer(seconds, info, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or its class name if it has no message."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def format_value(value: Any) -> str:
    """A value as it is written in a config: quoted text, `true`, `null`; a description of anything nested."""
    match value:
        case str():
            return f'"{printable(value, 60)}"'
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case int() | float():
            digits = repr(value)
            return digits if len(digits) <= 24 else digits[:20] + "..."
        case Mapping():
            return "a mapping (key: value)"
        case list() | tuple():
            return "an empty list" if not value else "a list"
    return f"a {type(value).__name__}"


def silence_libraries() -> None:
    """Turn off other libraries' warnings, and their progress bars unless stderr is a terminal.

    Call it before they are imported. Variables that are already set in the environment are kept.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.stderr.isatty():
        # TQDM_DISABLE is only a default: bars created with `disable=None`, as in this package, ignore it
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading weights takes about a second
