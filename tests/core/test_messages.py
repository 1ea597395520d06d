"""Nothing that is printed controls a terminal or tells a secret of the environment."""

import io
import json
import sys

import pytest
from tqdm import tqdm

from lora_ft.core.messages import SafeStream, escape_controls, info, json_text, printable, redact

HOSTILE = "a\x1b[2J\x07\r\x9b31m\x7f\u202eb\u2066c\u2028d\u200ee\u061c\x00"


def through(text, terminal=False):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    SafeStream(stream).write(text)
    return stream.getvalue()


def test_controls_are_escaped_and_text_is_not():
    shown = escape_controls(HOSTILE)
    assert shown == r"a\x1b[2J\x07\r\x9b31m\x7f\u202eb\u2066c\u2028d\u200ee\u061c\x00"
    assert escape_controls("é\tсл\n日本 👩‍👩‍👧 a\u00a0b") == "é\tсл\n日本 👩‍👩‍👧 a\u00a0b"
    assert through(HOSTILE) == shown


def test_a_terminal_gets_colours_and_bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert through("\r\x1b[A\x1b[32mok\x1b[0m\n", terminal=True) == "\r\x1b[A\x1b[32mok\x1b[0m\n"
    assert through("\x1b]0;title\x07\x9b2J\u202e", terminal=True) == r"\x1b]0;title\x07\x9b2J\u202e"
    assert through("\r\x1b[A") == r"\r\x1b[A"


def test_a_line_is_above_the_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    with tqdm(total=3, file=sys.stderr, ascii=True, ncols=40) as bar:
        bar.update(1)
        info("said")
        assert bar.n == 1
    assert any(line.split("\r")[-1] == "said" for line in terminal.getvalue().split("\n"))


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_stays_json(ascii, indent):
    text = json_text({HOSTILE: ["é\t\n", "\udcff"]}, indent, ascii)
    assert json.loads(text) == {HOSTILE: ["é\t\n", "\udcff"]}
    assert text.replace("\n", "").isprintable() and ("é" in text) is not ascii
    assert through(text) == text


TOKEN = "plainsecretvalue"


@pytest.fixture
def secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", TOKEN + "\n")
    monkeypatch.setenv("MONKEY", "a common text")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("DB_PASS", "short")


def test_secrets_of_the_environment_are_not_shown(secrets, tmp_path, capsys):
    quoted = f"Illegal header value b'Bearer {TOKEN}\\n' for http://bob:hunter2@host/, hf_{'x' * 34}"
    shown = "Illegal header value b'Bearer (WANDB_API_KEY)\\n' for http://(secret)@host/, (secret)"
    assert redact(quoted) == printable(quoted) == through(quoted) == shown
    info(quoted)
    assert capsys.readouterr().err == shown + "\n"
    plain = f"a common text, short, {tmp_path}, hf_model, https://host/a:b@c"
    assert redact(plain) == plain
    assert TOKEN[:8] not in printable("x" * 190 + TOKEN)  # not half of one, where a text is cut
