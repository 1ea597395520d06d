"""Messages for people: always on stderr, and always safe to print."""

import sys
from collections.abc import Mapping
from typing import Any


def printable(text: str, limit: int = 200, keep: str = "") -> str:
    """Text of a user, safe to print: control characters and escape codes as \\x1b and the like; cut at `limit`.

    keep: control characters that may stay, such as line ends.
    """
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode() for c in cut
    )


def info(message: str) -> None:
    """A message on stderr, a user's control characters shown escaped."""
    print("\n".join(printable(line, 2000) for line in message.split("\n")), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """`info`, marked as a warning."""
    info(f"warning: {message}")


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in a line that is safe to print."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def format_value(value: Any) -> str:
    """A value as a config would have it, for a message: text in quotes, `true`, `null`."""
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
