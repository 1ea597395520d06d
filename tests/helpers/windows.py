"""What Windows refuses, imitated in a process that never needs Linux again: a fork of the tests.

No module, function or signal of Unix alone; folders can't be opened; an open or mapped file can't be replaced or removed, nor
the folder around it; no names that Windows can't hold, and none that differ from another by case only; the console and text
files are cp1252 unless an encoding is given; a program is started with what Windows' Popen takes. Modules and functions are
hidden from lora_ft alone: other libraries have ways of their own there.
"""

import builtins
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import psutil

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
HIDDEN = {
    "os": """fork forkpty statvfs sysconf sched_getaffinity sched_setaffinity getuid geteuid getgid setpgrp getpgid getpgrp
        setsid killpg chown fchown nice getloadavg uname mkfifo pread sync ST_RDONLY O_DIRECTORY O_NOFOLLOW O_CLOEXEC
        O_NONBLOCK wait3 wait4 WNOHANG WIFEXITED WEXITSTATUS""",
    "signal": "SIGKILL SIGALRM SIGCHLD SIGHUP SIGUSR1 SIGUSR2 SIGPIPE setitimer alarm pthread_kill sigwait",
    "select": "poll epoll",
    "sys": "",
}
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)

_in_hook = threading.local()


def imitate(before_opening: Callable[[Path], None] = lambda path: None, console: str = "cp1252") -> None:
    """Make this process one of Windows, as far as Python code can tell.

    before_opening: is told of every file first. console: its encoding.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "lora_ft"]:
        del sys.modules[name]  # to be imported again, with what is hidden now
    sys.modules.update({name: Partial(name) for name in HIDDEN})
    builtins.__import__ = _import
    memory, rss = psutil.Process.memory_info, psutil.Process().memory_info().rss
    psutil.Process.memory_info = lambda self: types.SimpleNamespace(peak_wset=rss, **memory(self)._asdict())
    for name in ("RLIMIT_AS", "RLIM_INFINITY"):
        delattr(psutil, name)
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=console, errors="strict")  # type: ignore[union-attr]
    builtins.open = io.open = _open  # type: ignore[assignment]
    subprocess.Popen = Program  # type: ignore[assignment,misc]
    sys.addaudithook(lambda event, arguments: _watch(event, arguments, before_opening))


def run(*arguments: str) -> int:
    """`lora-ft ARGUMENTS` in this process; returns its exit code."""
    sys.argv = ["lora-ft", *arguments]
    try:
        importlib.import_module("lora_ft.cli").main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Partial(types.ModuleType):
    """A module of the standard library, for lora_ft without its names in HIDDEN, as `import` gives it from now on."""

    def __init__(self, name: str):
        self.__dict__.update(real=sys.modules[name], hidden=HIDDEN[name].split(), __name__=name)

    def __getattr__(self, name: str):
        if not _is_ours(sys._getframe(1)):
            return getattr(self.real, name)
        if name in self.hidden:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return "win32" if (self.__name__, name) == ("sys", "platform") else getattr(self.real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.real, name, value)


def _is_ours(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("lora_ft")


def _import(name: str, *others, **named):
    if name in MODULES and _is_ours(sys._getframe(1)):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _plain_import(name, *others, **named)


_plain_open, _plain_import = io.open, builtins.__import__


def _open(file, mode="r", buffering=-1, encoding=None, *more, **named):
    return _plain_open(
        file,
        mode,
        buffering,
        "cp1252" if "b" not in mode and encoding in (None, "locale") else encoding,
        *more,
        **named,
    )


def _watch(event: str, arguments: tuple, before_opening: Callable[[Path], None]) -> None:
    if getattr(_in_hook, "busy", False) or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    if "filelock" in str(sys._getframe(2).f_globals.get("__name__")):
        return
    _in_hook.busy = True
    try:
        path = Path(os.fsdecode(arguments[0]))
        if event == "open" and not str(path).startswith(("/proc", "/sys", "/dev")):
            before_opening(path)
            if path.is_dir():
                raise PermissionError(13, "Permission denied", str(path))
            if arguments[2] & os.O_CREAT:
                _check_name(path)
        elif event == "os.mkdir":
            _check_name(path)
        elif event == "os.rename":
            target = Path(os.fsdecode(arguments[1]))
            _check_name(target)
            _check_free(path, target)
            if path.is_dir() and target.exists():
                raise FileExistsError(17, "File exists", str(target))
        elif event in ("os.remove", "os.rmdir"):
            _check_free(path)
    finally:
        _in_hook.busy = False


def _check_name(path: Path) -> None:
    if FORBIDDEN.search(path.name):
        raise OSError(22, "Invalid argument", str(path))
    if not os.path.lexists(path) and path.parent.is_dir():
        twins = [name for name in os.listdir(path.parent) if name.lower() == path.name.lower()]
        assert not twins, f"{path}: on Windows this is {twins[0]}"


def _check_free(*paths: Path) -> None:
    """Raise PermissionError if a path or anything below it is open or mapped."""
    held = {line.split(maxsplit=5)[5].strip() for line in _plain_open("/proc/self/maps") if "/" in line}
    for number in os.listdir("/proc/self/fd"):
        try:
            held.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue  # that of the listing
    for path in paths:
        name = os.path.realpath(path)
        if any(other == name or other.startswith(name + "/") for other in held):
            raise PermissionError(13, "Permission denied", str(path))


class Program(subprocess.Popen):
    """`python -m lora_ft ...` as a fork, which has imported everything; any other program as ever."""

    def __init__(self, command, *, preexec_fn=None, process_group=None, **streams):
        assert preexec_fn is None, "preexec_fn is not supported on Windows platforms"
        if list(command[1:3]) != ["-m", "lora_ft"]:
            super().__init__(command, **streams)
            return
        self.returncode = None
        reader, writer = os.pipe()
        if pid := os.fork():
            os.close(writer)
            self.pid, self.stderr = (
                pid,
                _plain_open(reader, encoding=streams.get("encoding") or "cp1252", errors="replace"),
            )
            return
        kept, code = (sys.stdout, sys.stderr), 1  # not closed, which would close these files
        try:
            os.dup2(writer, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            code = run(*command[3:])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code if kept else 1)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, signum: int) -> None:
        raise ValueError(f"Unsupported signal: {signum}")
