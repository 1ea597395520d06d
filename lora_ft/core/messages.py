"""Messages to the user: on stderr, with control characters escaped and without secrets; and JSON on one line."""

import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lora_ft.core.terminal import ACTIVITY, can_draw, columns, doing, is_terminal, wrapped

# control characters but \t and \n, C1, and those that end lines or change the direction of text
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
SEQUENCE = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\r)")  # by which rich and tqdm draw on a terminal
SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASS(WD|WORD|PHRASE)?|(API)?KEY|CREDENTIALS?|PAT|AUTH)(_|$)", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
)  # the hub's tokens, user:password@ of a URL
MIN_SECRET = 8  # characters: a shorter value is a word of its own


def escape_controls(text: str) -> str:
    """`text` with what could move a cursor, forge a line or reverse text shown as \\x1b and the like; lines and tabs stay."""
    return CONTROLS.sub(lambda match: _escaped(match[0]), text)


def redact(text: str) -> str:
    """`text` without the tokens and passwords of the environment, which errors of libraries quote."""
    for name, value in os.environ.items():
        value = value.strip()
        if len(value) >= MIN_SECRET and value in text and SECRET.search(name) and not os.path.exists(value):
            text = text.replace(value, f"({name})")
    return SECRET_TEXT.sub("(secret)", text)


class SafeStream:
    """An output stream whose text can't control a terminal, but for the sequences that draw tables and bars on one."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        """Whether bars and colours can be drawn."""
        return can_draw(self.stream)

    def write(self, text: str) -> int:
        """Write escaped text; returns the number of characters given."""
        drawn = self.isatty()
        parts = SEQUENCE.split(redact(text)) if drawn else [redact(text)]
        safe = "".join(part if i % 2 else escape_controls(part) for i, part in enumerate(parts))
        ACTIVITY.write(self.stream, safe) if drawn else self.stream.write(safe)
        return len(text)


def echo(text: object) -> None:
    """Print a result, of one or more lines, on stdout; on a terminal broken between words."""
    print(wrapped(escape_controls(str(text)), columns(sys.stdout)), flush=True)


def echo_json(obj: object) -> None:
    """Print a result as one line of JSON on stdout."""
    print(json_text(obj, ascii=not (sys.stdout.encoding or "").lower().startswith("utf")), flush=True)


def json_text(obj: object, indent: int | None = None, ascii: bool = False) -> str:
    """An object as JSON in which characters that can't be printed, or all but ASCII, are escaped, as \\u0085."""
    text = json.dumps(obj, indent=indent, ensure_ascii=ascii)
    return text if text.isprintable() else re.sub(r"[^\n -~]", lambda m: _json_escaped(m[0]), text)


def _json_escaped(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1].replace("\x7f", r"\u007f")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()


def printable(text: str, limit: int = 200, keep: str = "") -> str:
    """`text` cut at `limit` characters, with control characters other than those of `keep` shown as \\x1b and the like."""
    text = redact(text)
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return cut if cut.isprintable() else "".join(c if c.isprintable() or c in keep else _escaped(c) for c in cut)


_prefix = ""


def prefix() -> str:
    """What `info` prints before each line."""
    return _prefix


def set_prefix(text: str) -> None:
    """Let `info` print `text` before each line: the name of one of several runs."""
    global _prefix
    _prefix = text


def info(message: str) -> None:
    """Print a message, of one or more lines, on stderr; on a terminal broken between words.

    Where that is on a full disk, the command still does its work.

    Raises:
        BrokenPipeError: nobody reads it any more.
    """
    text = "\n".join(_prefix + printable(line, 2000) for line in message.split("\n"))
    try:
        with _above_bars():
            print(wrapped(text, columns(sys.stderr)), file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def _above_bars() -> AbstractContextManager[None]:
    """Take the progress bars off the terminal, and draw them below what was printed meanwhile."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return bars.external_write_mode(file=sys.stderr) if bars else nullcontext()


def warn(message: str) -> None:
    """Print a message marked as a warning on stderr."""
    info(f"warning: {message}")


@contextmanager
def working(what: str, in_pipes: bool = False) -> Iterator[None]:
    """Say what is being done if it takes long: drawn on a terminal, else as a line where a person or, `in_pipes`, a log is."""
    if can_draw(sys.stderr) or not (in_pipes or is_terminal(sys.stderr)):
        with doing(what):
            yield
        return
    timer = threading.Timer(1.5, info, [f"{what} ..."])
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


def format_bytes(number: float) -> str:
    """Bytes in a readable unit: 12 KiB, 1.5 MiB, 1,234 MiB, 12.3 GiB."""
    if number >= 10 * 2**30:
        return f"{number / 2**30:,.1f} GiB"
    if number < 2**20:
        return f"{-(-number // 2**10):,.0f} KiB"
    return f"{number / 2**20:,.0f} MiB" if number >= 100 * 2**20 else f"{number / 2**20:,.1f} MiB"


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
    # Read when torch is imported: what a Mac's GPU lacks is computed on its CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if not sys.stderr.isatty():
        # TQDM_DISABLE is only a default: bars created with `disable=None`, as in this package, ignore it
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # PEFT imports it, where both are installed; on some CPUs it then tells of a kernel that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading weights takes about a second
