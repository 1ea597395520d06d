"""`lora-ft` as a shell runs it, in a fork of this process, which has imported everything: fast, and still real signals, limits
and exit codes."""

# ruff: noqa: E402

import codecs
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from lora_ft.core.messages import silence_libraries

silence_libraries()  # as every command does before its first heavy import

import torch
from tqdm import tqdm

import lora_ft.commands.train  # noqa: F401 (imported once, before the forks)
from lora_ft.cli import main
from lora_ft.model.device import equal_products

equal_products()  # MKL reads it once: without it, forks from before and after this process's first product would differ

TRAIN = ("train", "config.yaml")
SAID = ("stdout.txt", "stderr.txt")

tqdm.set_lock(threading.RLock())  # its own is shared by forks, and a killed one may have held it


class Ended(NamedTuple):
    """code: the exit code, or minus the signal that killed it."""

    code: int
    out: str
    err: str
    seconds: float


class Started(NamedTuple):
    pid: int
    folder: Path
    since: float

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def said(self) -> str:
        path = self.folder / SAID[1]
        return path.read_text() if path.exists() else ""

    def wait_for(self, there: Callable[[], object], seconds: float = 60) -> None:
        """Wait until `there()` is true; the command must be alive then."""
        until = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < until and os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.said()
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with suppress(ChildProcessError):  # its end was waited for
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)

    def end(self, seconds: float = 100) -> Ended:
        """Wait for its end; one that hangs is killed and fails the test."""
        until = time.monotonic() + seconds
        while (state := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {self.said()}")
            time.sleep(0.005)
        code = os.WEXITSTATUS(state[1]) if os.WIFEXITED(state[1]) else -os.WTERMSIG(state[1])
        out, err = (
            (self.folder / name).read_text(errors="replace") if (self.folder / name).exists() else "" for name in SAID
        )
        assert "Traceback" not in err, err
        return Ended(code, out, err, time.monotonic() - self.since)


def start(folder: Path, *arguments: str, before: Callable[[], object] = lambda: None) -> Started:
    """Fork `lora-ft ARGUMENTS` in `folder`. `before` is called in the fork: the place for a fault to be put in."""
    for name in SAID:
        (folder / name).unlink(missing_ok=True)
    since, pid = time.monotonic(), os.fork()
    if pid:
        return Started(pid, folder, since)

    def in_folder() -> None:
        os.chdir(folder)
        for stream, name in enumerate(SAID, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)

    _run(in_folder, arguments, before)


def _run(prepare: Callable[[], object], words: Sequence[str], before: Callable[[], object] = lambda: None) -> NoReturn:
    """In a fork: `lora-ft WORDS` to its end, with the streams and the folder that `prepare` has set."""
    try:
        prepare()
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        sys.argv = ["lora-ft", *words]
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)
        torch.set_num_threads(1)
        before()
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException as e:  # noqa: BLE001 (what a shell would show)
        print(f"Traceback: {type(e).__name__}: {e}", file=sys.stderr)
        code = 1
    os._exit(code)


class Forked:
    """Stands in for subprocess.Popen of `python -m lora_ft WORDS`, of which a command reads stderr: a fork of the command."""

    def __init__(self, command: Sequence[str], **_: object):
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _run(lambda: os.dup2(write, 2), command[3:])
        os.close(write)
        self.stderr = open(read)  # noqa: SIM115 (closed by `wait`)

    def wait(self) -> int:
        self.stderr.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def without_rights(folder: Path) -> Callable[[], None]:
    """What takes a process the rights of root, whom permissions don't bind; `folder` and those above stay reachable."""
    codecs.lookup("utf-8-sig")  # the library may be where only root can read
    for place in (p for p in (folder, *folder.parents) if "pytest" in str(p)):
        place.chmod(0o755)

    def drop() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)

    return drop


def cli(folder: Path, *arguments: str, before: Callable[[], object] = lambda: None) -> Ended:
    return start(folder, *arguments, before=before).end()


def settings(**values: object) -> list[str]:
    """`--set` for each: settings(train__max_steps=1) is train.max_steps=1."""
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def refused(ended: Ended, code: int, *words: str) -> None:
    """One message on stderr, with these words, and this exit code."""
    assert ended.code == code, ended
    assert "this is a bug" not in ended.err and "Error:" not in ended.err, ended.err
    for word in words:
        assert word in ended.err, (word, ended.err)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but what the command said."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in SAID)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def train(folder: Path, *changes: str, flags: Sequence[str] = (), before: Callable[[], object] = lambda: None) -> Ended:
    """`lora-ft train config.yaml` with settings as KEY=VALUE."""
    return cli(folder, *training(*changes), *flags, before=before)


def training(*changes: str) -> list[str]:
    """The words of `lora-ft train config.yaml` with settings as KEY=VALUE."""
    return [*TRAIN, *(word for change in changes for word in ("--set", change))]


def refused_untouched(folder: Path, code: int, *words: str, command: Sequence[str] = TRAIN) -> None:
    """A command is refused without a result on stdout, every file stays as it was, and none is added."""
    before = files(folder)
    ended = cli(folder, *command)
    refused(ended, code, *words)
    assert not ended.out, ended.out
    assert files(folder) == before
