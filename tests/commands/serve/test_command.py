"""`lora-ft serve` as a process: it answers, starts again after a kill, finishes what runs after SIGTERM, refuses the unsafe.

No step waits longer than SECONDS, and whatever happens the process is killed.
"""

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from tests.helpers.command import Started, cli, refused, start
from tests.helpers.tiny import write_base

SECONDS = 30
STREAM = {"model": "base", "prompt": "the film", "max_tokens": 100, "temperature": 1, "seed": 1, "n": 8, "stream": True}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_base(tmp_path / "base")
    return tmp_path


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[tuple[Started, int]]:
    """A server that listens, and its port."""
    server, out = start(folder, "serve", "base", "--port", str(port)), folder / "stdout.txt"
    try:
        server.wait_for(lambda: out.exists() and "/v1:" in out.read_text(), SECONDS)
        yield server, int(re.search(r":(\d+)/v1:", out.read_text())[1])
    finally:
        server.kill()


def asked(connection: HTTPConnection, body: dict) -> HTTPResponse:
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    return answer


def is_refused(port: int) -> bool:
    try:
        with closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
            connection.request("GET", "/health")
            connection.getresponse().read()
    except OSError:
        return True
    return False


def test_it_starts_again_after_a_kill_and_finishes_what_runs_after_sigterm(folder):
    with serving(folder) as (server, port), closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
        assert asked(connection, STREAM).readline().startswith(b"data: {")
        server.send(signal.SIGKILL)
        assert server.end(SECONDS).code == -signal.SIGKILL
    with (
        serving(folder, port) as (server, _),
        closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection,
    ):
        answer = asked(connection, STREAM)
        first = answer.readline()
        server.send(signal.SIGTERM)
        until = time.monotonic() + SECONDS
        while not is_refused(port):
            assert time.monotonic() < until
            time.sleep(0.02)
        rest = answer.read().decode()
        ended = server.end(SECONDS)
    assert first.startswith(b"data: {") and rest.endswith("data: [DONE]\n\n") and rest.count('"finish_reason": "') == 8
    assert ended.code == 0 and "SIGTERM: finishing what runs" in ended.err
    assert "the film" not in ended.out + ended.err


def test_what_is_unsafe_or_can_not_work_is_refused(folder):
    (folder / "keys").write_text("two words\n")
    for words, message in (
        (["--host", "0.0.0.0"], "other machines could use the model without a key"),
        (["--api-key-file", "nothing"], "can't be read"),
        (["--api-key-file", "keys"], "one key a line"),
        (["--adapters-folder", "nothing"], "no such folder"),
        (["--cache-tokens", "999999999999"], "Lower it"),
        (["--host", "192.0.2.1", "--insecure"], "the address can't be used"),
    ):
        refused(cli(folder, "serve", "base", *words), 6 if "--insecure" in words else 2, message)
