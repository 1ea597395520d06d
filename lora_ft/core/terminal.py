"""What a terminal shows beside plain lines: text wrapped at words, and what is being done while nothing else is seen.

Nothing of this is written into a pipe or a file. A terminal that can't move its cursor (TERM=dumb) gets plain lines.
"""

import os
import re
import shlex
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_ft.core.ranks import rank

QUIET_SECONDS = 0.7  # after which a terminal shows what is being done
COMMAND = re.compile(r"(?:(?<=^)|(?<=\s))lora-ft [^,`]+$")  # a command that ends its line, to be copied


def is_terminal(stream: Any) -> bool:
    """Whether a person sees this stream, on any kind of terminal."""
    return bool(getattr(stream, "stream", stream).isatty())


def can_draw(stream: Any) -> bool:
    """Whether this is a terminal on which bars and tables can be drawn."""
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def columns(stream: Any) -> int | None:
    """The width of the terminal that this stream is; None for a pipe or a file."""
    if not is_terminal(stream):
        return None
    try:
        return int(os.environ.get("COLUMNS", "")) or 80
    except ValueError:
        pass
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def wrapped(text: str, width: int | None) -> str:
    """Lines broken between words, and a command's so that it can be copied into a shell; None: `text` as it is."""
    if width is None:
        return text
    return "\n".join("\n".join(_wrapped_line(line, width)) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())] + "  "
    if found := COMMAND.search(line):
        text = line[: found.start()].rstrip()
        lines: list[str] = []
        try:
            words = [shlex.quote(word) for word in shlex.split(found[0])]
        except ValueError:  # a quote that is left open
            words = found[0].split()
        for word in words:
            if lines and len(indent) + len(lines[-1]) + len(word) + 3 <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        command = [f"{indent if text or i else indent[:-2]}{part}" for i, part in enumerate(lines)]
        return [*(_wrapped_line(text, width) if text else []), *(f"{part} \\" for part in command[:-1]), command[-1]]
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )


class Activity:
    """Draws `what is being done: 3 s` on stderr's terminal while the cursor is at a line's start and nothing is written.

    A bar or a prompt leaves the cursor behind its text, and is never drawn over.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # (what, since when), the innermost last; None: nothing is drawn
        self.tasks: list[tuple[str | None, float]] = []
        self.written, self.at_line_start, self.drawn = 0.0, True, ""
        self.stop = threading.Event()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a fork there is no thread, and nobody who would release the lock."""
        self.lock, self.tasks, self.drawn = threading.RLock(), [], ""

    def write(self, stream: Any, text: str) -> None:
        """Write text of a command to a terminal, in the place of what is drawn."""
        with self.lock:
            self.erase()
            stream.write(text)
            self.written = time.monotonic()
            if text:
                self.at_line_start = text[-1] in "\n\r"

    def erase(self) -> None:
        """Take away what is drawn."""
        if self.drawn:
            self._draw("")

    def run(self) -> None:
        """Draw until `stop`: the work of a thread."""
        while not self.stop.wait(0.25):
            with self.lock:
                now = time.monotonic()
                what, since = self.tasks[-1] if self.tasks else (None, now)
                if what and self.at_line_start and now - self.written >= QUIET_SECONDS:
                    self._draw(f"{what[: (columns(sys.stderr) or 80) - 12]}: {now - since:.0f} s")

    def _draw(self, text: str) -> None:
        if text != self.drawn:
            self.drawn, stream = text, getattr(sys.stderr, "stream", sys.stderr)
            stream.write(f"\r{text}\x1b[K")
            stream.flush()


ACTIVITY = Activity()


@contextmanager
def shown_activity() -> Iterator[None]:
    """Draw what `ACTIVITY.tasks` says while a command runs, if stderr is a terminal that can; of several processes in one."""
    if rank() != 0 or not can_draw(sys.stderr):
        yield
        return
    ACTIVITY.stop.clear()
    ACTIVITY.written = time.monotonic()
    threading.Thread(target=ACTIVITY.run, daemon=True).start()
    try:
        yield
    finally:
        ACTIVITY.stop.set()
        with ACTIVITY.lock:
            ACTIVITY.erase()


@contextmanager
def doing(what: str | None) -> Iterator[None]:
    """Name what is being done; None while a person types or another process draws."""
    with ACTIVITY.lock:
        if what is None:
            ACTIVITY.erase()
        ACTIVITY.tasks.append((what, time.monotonic()))
    try:
        yield
    finally:
        with ACTIVITY.lock:
            del ACTIVITY.tasks[-1:]  # a fork has none
            ACTIVITY.at_line_start |= what is None  # after the person's Enter
