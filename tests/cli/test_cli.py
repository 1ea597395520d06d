"""The commands as a shell sees them: help, exit codes, messages; a config error does not import torch."""

import errno
import os
import subprocess
import sys
import types

import pytest

import lora_ft
from lora_ft import cli
from lora_ft.core.errors import DataError
from lora_ft.core.messages import silence_libraries
from lora_ft.core.trust import NO_TRUST
from tests.helpers.tiny import python

GOOD = 'model: {name: gpt2}\ndata: {train: reviews.jsonl, text: "{review}"}\n'


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lora_ft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("command", ["train", "eval", "generate", "merge", "check"])
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.returncode == 0 and f"Example: lora-ft {command}" in result.stdout


def test_version():
    assert run("--version").stdout == f"lora-ft {lora_ft.__version__}\n"


def test_ctrl_c_while_the_command_line_is_imported():
    pressed = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background process ignores it
        "class Finder:\n"
        "    def find_spec(name, *_): name == 'typer' and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "runpy.run_module('lora_ft', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", pressed], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["tran"], ["train"], ["check", "c.yaml", "--sett", "x=1"], ["merge", "a", "b"]),
        *(["generate", "--seed", str(2**64)], ["export", "out", "--to", "onnx"]),
    ],
)
def test_a_wrong_command_line_is_2(arguments):
    result = run(*arguments)
    assert result.returncode == 2 and "Usage: lora-ft" in result.stderr and not result.stdout


@pytest.mark.parametrize("arguments", [["train"], ["check"], ["eval", "--config"]])
def test_a_config_error_is_2_with_the_line_and_no_traceback(tmp_path, arguments):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + "train:\n  lerning_rate: 1\n")
    result = run(*arguments, str(path))
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == f"{path}:4: train.lerning_rate: no such setting; did you mean learning_rate?\n"


def test_a_missing_config_and_contradicting_options():
    result = run("train", "none.yaml")
    assert result.returncode == 2 and result.stderr.startswith("none.yaml: no such file")
    assert run("train", "none.yaml", "--resume", "--overwrite").returncode == 2
    assert run("merge", "a", "--adapter", "b").stderr == "FOLDER and --adapter: give only one\n"


def test_an_empty_shape_is_a_config_error():
    result = run("check", "--shape", "")
    assert result.returncode == 2 and "the command line: model.name" in result.stderr


@pytest.mark.parametrize("arguments", [["--debug", "train", "none.yaml"], ["train", "none.yaml", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_code(arguments):
    result = run(*arguments)
    assert result.returncode == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("none.yaml: no such file")


def test_a_config_error_and_help_import_no_torch():
    program = (
        "import sys, lora_ft.cli, lora_ft.config.load\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    python(program)


def in_command(monkeypatch, capsys, error: BaseException, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of `lora-ft train` whose work raises `error`."""
    import lora_ft.config.load

    def fail(*_):
        raise error

    monkeypatch.setattr(lora_ft.config.load, "load_config", fail)
    monkeypatch.setattr(sys, "argv", ["lora-ft", "train", "c.yaml", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    "error, code, said",
    [
        (DataError("a.jsonl:3: broken \x1b[31m"), 3, "a.jsonl:3: broken \\x1b[31m\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 6, "out/x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 6, "out: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", b"out"), 6, "out: Read-only file system"),
        (MemoryError(), 7, "train.micro_batch_tokens"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 7, "Tried to allocate 2.00 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 7, "9 bytes"),
        (KeyboardInterrupt(), 130, "stopped"),
        (RuntimeError("surprise"), 1, "this is a bug: RuntimeError: surprise; run again with --debug"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "this is a bug"),
        (SystemExit(143), 143, ""),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, said):
    got, err = in_command(monkeypatch, capsys, error)
    assert got == code and said in err and "Traceback" not in err and "\x1b" not in err


def test_a_bug_with_debug_has_its_traceback(monkeypatch, capsys):
    code, err = in_command(monkeypatch, capsys, RuntimeError("surprise"), "--debug")
    assert code == 1 and "Traceback" in err and "run again" not in err


def test_a_closed_pipe_is_quiet(tmp_path):
    program = (
        "import sys, types, lora_ft.config.load, lora_ft.cli\n"
        "lora_ft.config.load.load_config = lambda *_: [print('x' * 100) for _ in range(10_000)]\n"
        "sys.argv = ['lora-ft', 'check', 'c.yaml']\n"
        "lora_ft.cli.main()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_options_reach_the_commands(monkeypatch, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD)
    calls = []
    for module, name in (("train", "train"), ("check.command", "check"), ("evaluate", "evaluate_command")):
        room = types.ModuleType(f"lora_ft.commands.{module}")
        setattr(room, name, lambda *a, **k: calls.append((a, k)))
        monkeypatch.setitem(sys.modules, f"lora_ft.commands.{module}", room)
    room = types.ModuleType("lora_ft.commands.merge")
    room.merge_command = lambda *a, **k: calls.append((a, k))
    monkeypatch.setitem(sys.modules, "lora_ft.commands.merge", room)
    for group in (cli.run, cli.use):
        monkeypatch.setattr(group, "silence_libraries", lambda: None)

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["lora-ft", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        return calls.pop()

    (config,), options = call("train", str(path), "--set", "adapter.rank=3", "--set", "train.seed=2", "--overwrite")
    assert (config.adapter.rank, config.train.seed) == (3, 2)
    assert options == {
        **{"resume": False, "overwrite": True, "until": None, "trust": NO_TRUST},
    }
    (config,), options = call("check", str(path), "--json")
    assert config.model.name == "gpt2" and options == {
        "as_json": True,
        "time": False,
        "trust": NO_TRUST,
    }
    (folder,), options = call("eval", "--json", "--data", "d.csv", "--set", "data.max_length=9")
    assert (
        list(map(str, folder)) == ["out"]
        and options["as_json"]
        and options["data"] == "d.csv"
        and options["base"] is None
    )
    assert options["overrides"] == ["data.max_length=9"] and options["config_path"] is None
    (folder,), options = call("eval", "out-merged", "--config", str(path), "--base", "b", "--other-base")
    assert list(map(str, folder)) == ["out-merged"] and options["config_path"] == path and options["trust"].other_base
    assert str(call("merge")[0][0]) == "out" and str(call("merge", "a")[0][0]) == "a"
    (folder,), options = call("merge", "--adapter", "out/", "--base", "gpt2", "--no-verify")
    assert str(folder) == "out" and options == {
        **{
            "base": "gpt2",
            "output": None,
            "onto": None,
            "verify": False,
            "trust": NO_TRUST,
        }
    }


def test_quiet_leaves_the_users_own_settings(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "info", "TOKENIZERS_PARALLELISM": "x"})
    import warnings

    with warnings.catch_warnings():
        silence_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and os.environ["TOKENIZERS_PARALLELISM"] == "x"
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"  # a test's stderr is no terminal


def test_the_python_api_is_lazy():
    program = (
        "import sys, lora_ft; assert 'torch' not in sys.modules; print(lora_ft.inject_lora.__name__, dir(lora_ft))"
    )
    printed = python(program)
    assert printed.startswith("inject_lora ") and "'merge'" in printed
    with pytest.raises(AttributeError, match="injekt"):
        _ = lora_ft.injekt
