"""What a terminal shows: words that stay in one piece, commands that can be copied, and what is being done."""

import io
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from lora_ft.core import messages, terminal
from lora_ft.core.messages import SafeStream, info, working
from lora_ft.core.terminal import ACTIVITY, can_draw, doing, shown_activity, wrapped


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def on_screen(monkeypatch, kind: str) -> Iterator[Screen]:
    """stderr is a terminal of 40 columns and of this kind."""
    screen = Screen()
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(terminal, "QUIET_SECONDS", 0)
    monkeypatch.setattr(ACTIVITY, "at_line_start", True)  # whatever other tests have written
    with redirect_stderr(SafeStream(screen)):
        yield screen


def await_text(screen: Screen, text: str) -> None:
    end = time.monotonic() + 20
    while text not in screen.getvalue():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_no_word_is_broken():
    text = "  a message of 0.1553, several-words and a/path/that/is/longer/than/the/width\nand its second line"
    lines = wrapped(text, 30).split("\n")
    assert " ".join(lines).split() == text.split()
    assert all(len(line) <= 30 or len(line.split()) == 1 for line in lines) and lines[1].startswith("    ")
    assert wrapped(text, None) == text and wrapped("short", 30) == "short"


def test_a_command_can_be_copied():
    prompt = "data.prompt=Review: {text}"
    words = ["lora-ft", "train", "my config.yaml", "--set", prompt, "--set", "output=out/7", "--resume"]
    message = wrapped(f"stopped after step 5, which is saved. Continue with: {shlex.join(words)}", 40)
    text, _, command = message.partition("lora-ft")
    assert shlex.split(f"lora-ft{command}".replace("\\\n", "")) == words and text.split()[-2:] == ["Continue", "with:"]
    assert max(map(len, message.split("\n"))) <= 40
    assert "\\" not in wrapped("Next: lora-ft check config.yaml, then lora-ft train config.yaml", 40)


def test_what_is_being_done_is_seen_and_taken_away(monkeypatch):
    with on_screen(monkeypatch, "xterm") as screen, shown_activity(), working("loading the base"):
        await_text(screen, "\rloading the base: 0 s\x1b[K")
        info("a message")
        assert "\r\x1b[Ka message\n" in screen.getvalue()
        print("a bar", end="", file=sys.stderr)
        before = screen.getvalue()
        time.sleep(0.6)
        assert screen.getvalue() == before  # else it were drawn over the bar
        print(file=sys.stderr)
        await_text(screen, "a bar\n\rloading")
        with doing(None):  # a person types
            before = screen.getvalue()
            time.sleep(0.6)
            assert screen.getvalue() == before and before.endswith("\r\x1b[K")
        await_text(screen, f"{before}\rloading")
    assert not ACTIVITY.tasks and not ACTIVITY.drawn


def test_a_dumb_terminal_gets_lines(monkeypatch):
    timer = threading.Timer
    monkeypatch.setattr(messages.threading, "Timer", lambda seconds, *args: timer(0, *args))
    with on_screen(monkeypatch, "dumb") as screen, shown_activity(), working("loading the base"):
        assert not can_draw(sys.stderr) and not sys.stderr.isatty()
        await_text(screen, "loading the base ...\n")
        info("word " * 20)
    assert not {"\x1b", "\r"} & {*screen.getvalue()} and max(map(len, screen.getvalue().split("\n"))) <= 40
