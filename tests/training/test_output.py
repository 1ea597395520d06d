"""The output folder: locked by one run at a time; files of killed runs are removed, files of others stay."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import filelock
import pytest

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError
from lora_ft.core.storage import manifest
from lora_ft.training import lock
from lora_ft.training import output as writing


def checkpoint(output: Path, step: int) -> Path:
    folder = run_folder.checkpoint_of(output, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "lora_ft.json").write_text(json.dumps({"files": manifest(folder, ["state.json"])}))
    return folder


# ---- the lock ----

HOLD = """
import sys
from pathlib import Path
from lora_ft.training.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/out."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_at_once_with_the_pid_of_the_first(tmp_path, holder):
    for _ in range(2):  # the refusal does not disturb the lock
        said = rf"in use by another run \(pid {holder.pid}\).*--set output="
        with pytest.raises(FilesError, match=said), lock.locked(tmp_path / "out"):
            pass
    holder.stdin.close()
    holder.wait()
    assert not (tmp_path / "out").exists()


def test_the_lock_of_a_killed_run_does_not_block(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / lock.LOCK).exists()
    with lock.locked(tmp_path / "out"):
        assert (tmp_path / "out" / lock.HOLDER).read_text() == str(os.getpid())
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_that_stays_empty_is_removed_and_one_with_files_is_not(tmp_path):
    with lock.locked(tmp_path / "a" / "out"):
        pass
    assert not (tmp_path / "a" / "out").exists()
    with pytest.raises(RuntimeError), lock.locked(tmp_path / "out"):
        (tmp_path / "out" / "file").touch()
        raise RuntimeError
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINTR])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with warnings.catch_warnings(action="ignore"), lock.locked(tmp_path / "out"):  # filelock's own fallback for ENOSYS
        (tmp_path / "out" / "file").touch()
    warned = re.search(r"out: its file system can't lock it .*no other run uses it", capsys.readouterr().err)
    assert warned or number == errno.ENOSYS
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_a_lock_that_gets_no_answer_is_given_up(tmp_path, monkeypatch, capsys):
    """A system call that a dead server interrupts again and again never returns to Python but for a signal."""
    monkeypatch.setattr("fcntl.flock", lambda *_: time.sleep(60))
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.1)
    before = signal.getsignal(signal.SIGALRM)
    with lock.locked(tmp_path / "out"):
        pass
    assert "can't lock it" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_lock_that_fails_in_another_way_is_an_error(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(filelock.FileLock, "_acquire", refused)
    said = r"out: can't be written or locked \(Input/output error\).*--set output="
    with pytest.raises(FilesError, match=said), lock.locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_the_holders_pid_may_vanish_while_it_is_read(tmp_path, holder):
    (tmp_path / "out" / lock.HOLDER).unlink()
    with pytest.raises(FilesError, match=r"in use by another run \(pid unknown\)"), lock.locked(tmp_path / "out"):
        pass


def test_a_forged_record_is_refused(tmp_path):
    (tmp_path / "lora_ft.json").write_text('{"files": 5}')
    with pytest.raises(FilesError, match="not a table of files"):
        writing.check_foreign(tmp_path)


# ---- removal ----


def test_files_of_killed_runs_are_removed_and_no_others(tmp_path):
    leftovers = [".lora_ft.json.tmp-1", ".adapter_model.safetensors.tmp-99", "checkpoints/.step-3.partial-7"]
    others = [".notes.tmp-1", ".lora_ft.json.tmp-x", "checkpoints/.step-3.partial-mine", "checkpoints/step-4.damaged-1"]
    (tmp_path / "checkpoints").mkdir()
    for name in leftovers + others:
        path = tmp_path / name
        path.mkdir() if "step" in name else path.touch()
    (tmp_path / leftovers[-1] / "state.json").touch()
    with lock.locked(tmp_path):
        assert sorted(n for n in leftovers + others if (tmp_path / n).exists()) == sorted(others)


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, 1)

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "remove_listed", killed)
    with pytest.raises(KeyboardInterrupt):
        writing.remove_checkpoint(folder)
    assert run_folder.checkpoint_folders(tmp_path) == []
    with lock.locked(tmp_path):
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_file_of_anyone_else_stays_where_it_was(tmp_path):
    folder = checkpoint(tmp_path, 1)
    (folder / "notes.txt").touch()
    writing.remove_checkpoint(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_what_a_run_wrote_that_was_killed_at_its_end_is_removed_with_it(tmp_path):
    """Else its adapter_config.json would lie beside a complete model that is trained next."""
    folder, names = checkpoint(tmp_path, 1), ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    for name in names:
        (folder / name).touch()
        (tmp_path / name).touch()
    (folder / "lora_ft.json").write_text(json.dumps({"files": manifest(folder, ["state.json", *names])}))
    (tmp_path / "tokenizer.json").touch()  # not of this run
    writing.clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "tokenizer.json"]


def test_rotation_keeps_what_is_newer_than_the_run(tmp_path):
    """A damaged newest checkpoint, which the run did not resume from, is left for the user to inspect."""
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    writing.rotate(tmp_path, 1, {3})
    assert [p.name for p in run_folder.checkpoint_folders(tmp_path)] == ["step-3", "step-4"]


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-1", "tensorboard"])
def test_an_overwrite_does_not_follow_links(tmp_path, name):
    (tmp_path / "other").mkdir()
    folder = checkpoint(tmp_path / "other", 1)
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).symlink_to(folder if "step" in name else folder.parent)
    before = sorted(folder.iterdir())
    with pytest.raises(FilesError, match=f"{name}: a link. .*--set output="):
        writing.check_removable(tmp_path / "out")
    with lock.locked(tmp_path / "out"):
        pass
    assert sorted(folder.iterdir()) == before


def test_a_manifest_does_not_lead_out_through_a_link(tmp_path):
    for name in ("other", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/precious").touch()
    (tmp_path / "out/sub").symlink_to(tmp_path / "other")
    (tmp_path / "out/lora_ft.json").write_text('{"files": {"sub/precious": {}}}')
    for remove in (writing.check_removable, writing.clear):
        with pytest.raises(FilesError, match="sub/precious: leads out of the folder through a link"):
            remove(tmp_path / "out")
    assert (tmp_path / "other/precious").exists()


def test_the_pid_of_the_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / lock.HOLDER).symlink_to(tmp_path / "precious")
    with lock.locked(tmp_path / "out"):
        assert (tmp_path / "precious").read_text() == "mine"
