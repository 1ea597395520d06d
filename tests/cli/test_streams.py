"""Closed and full streams, locales, and other odd surroundings of a process: one message, the right exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ft.cli.exits import report_error

COMMAND = [sys.executable, "-m", "lora_ft"]


def run(*arguments: str, cwd: Path, before=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment: str):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=env, preexec_fn=before, stdout=stdout, stderr=stderr, timeout=100
    )
    return done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("arguments, code", [(["schema"], 0), (["check", "none.yaml"], 2)])
def test_closed_streams(tmp_path, closed, arguments, code):
    def close():
        for number in closed:
            os.close(number)

    found, _, err = run(*arguments, cwd=tmp_path, before=close)
    assert found == code and err.count("\n") == (code != 0 and 2 not in closed)


@pytest.mark.parametrize("arguments", [["schema"], ["--help"], ["--version"], ["env"]])
def test_a_full_stdout_is_named(tmp_path, arguments):
    with open("/dev/full", "w") as full:
        code, _, err = run(*arguments, cwd=tmp_path, stdout=full)
    assert code == 6 and err.count("\n") == 1 and "No space left on device" in err


@pytest.mark.parametrize("arguments, code", [(["schema"], 0), (["check", "none.yaml"], 2)])
def test_a_full_stderr_changes_no_exit_code(tmp_path, arguments, code):
    with open("/dev/full", "w") as full:
        assert run(*arguments, cwd=tmp_path, stderr=full)[0] == code


def test_help_that_nobody_reads(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    code, _, err = run("--help", cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (code, err) == (141, "")


POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}


def test_a_locale_without_utf8(tmp_path):
    (tmp_path / "é.yaml").write_text("model: {name: ñ}\ndata: {train: ü.jsonl, text: '{ö}', nö: 1}\n", encoding="utf-8")
    code, _, err = run("check", "é.yaml", cwd=tmp_path, **POSIX)
    assert code == 2 and err.isascii() and r"\xe9.yaml:2: data.n\xf6: " in err, err
    assert "did you mean \\xe9.yaml?" in run("check", "é.yml", cwd=tmp_path, **POSIX)[2]
    assert run("check", "é.yml", cwd=tmp_path, **POSIX, PYTHONIOENCODING="utf-8")[2].startswith("é.yml: no such file")


@pytest.mark.parametrize("value", ["abc", "-1", "", "1e9", "99999999999"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number(tmp_path, name, value):
    code, out, err = run("schema", cwd=tmp_path, **{name: value})
    assert (code, out) == (2, "") and f"{name}='{value}'" in err and f"env -u {name}" in err


def test_a_rank_beyond_the_processes(tmp_path):
    """Rank 1 of 1 would train, and write nothing."""
    code, _, err = run("schema", cwd=tmp_path, RANK="1")
    assert code == 2 and "RANK=1 with WORLD_SIZE=1" in err
    assert run("schema", cwd=tmp_path, RANK="1", WORLD_SIZE="2") == (0, "", "")  # the other process does it


def test_a_variable_that_a_library_cannot_use(monkeypatch, capsys):
    """As huggingface_hub says it while it is imported."""
    error = ValueError("invalid literal for int() with base 10: 'abc'")
    assert report_error(error, debug=False) == 1
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "abc")
    assert report_error(error, debug=False) == 2
    assert "HF_HUB_DOWNLOAD_TIMEOUT=abc in the environment: not usable" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert report_error(ValueError("expected: 1, abc"), debug=False) == 1


def test_a_current_folder_that_was_deleted(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    code, _, err = run("schema", cwd=folder, before=folder.rmdir)
    assert code == 6 and "current folder" in err and err.count("\n") == 1


def test_python_without_docstrings(tmp_path):
    code, _, err = run("schema", cwd=tmp_path, PYTHONOPTIMIZE="2")
    assert code == 2 and "PYTHONOPTIMIZE" in err
    assert run("schema", cwd=tmp_path, PYTHONOPTIMIZE="1")[0] == 0
