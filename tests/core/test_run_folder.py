"""What killed runs leave behind goes with the next one; what isn't a run's stays."""

import json
from pathlib import Path

import pytest

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError
from lora_ft.core.storage import manifest, verify_manifest


def checkpoint(output: Path, step: int) -> Path:
    folder = run_folder.checkpoint_of(output, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "lora_ft.json").write_text(json.dumps({"files": manifest(folder, ["state.json"])}))
    return folder


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path):
    theirs = [".lora_ft.json.tmp-1", ".adapter_model.safetensors.tmp-99", "checkpoints/.step-3.partial-7"]
    others = [".notes.tmp-1", ".lora_ft.json.tmp-x", "checkpoints/.step-3.partial-mine", "checkpoints/step-4.damaged-1"]
    (tmp_path / "checkpoints").mkdir()
    for name in theirs + others:
        path = tmp_path / name
        path.mkdir() if "step" in name else path.touch()
    (tmp_path / theirs[-1] / "state.json").touch()
    with run_folder.claimed(tmp_path):
        assert sorted(n for n in theirs + others if (tmp_path / n).exists()) == sorted(others)


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, 1)

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "remove_listed", killed)
    with pytest.raises(KeyboardInterrupt):
        run_folder.remove_checkpoint(folder)
    assert run_folder.checkpoint_folders(tmp_path) == []
    with run_folder.claimed(tmp_path):
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_file_of_anyone_else_stays_where_it_was(tmp_path):
    folder = checkpoint(tmp_path, 1)
    (folder / "notes.txt").touch()
    run_folder.remove_checkpoint(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_rotation_leaves_what_is_newer_than_the_run(tmp_path):
    """A damaged newest checkpoint, from before which the run goes on, is a person's to look at."""
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    run_folder.rotate(tmp_path, 1, {3})
    assert [p.name for p in run_folder.checkpoint_folders(tmp_path)] == ["step-3", "step-4"]


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800"])
def test_a_name_that_no_file_can_have_is_an_answer(tmp_path, name):
    with pytest.raises(FilesError, match="missing or unreadable"):
        verify_manifest(tmp_path, {name: {"size": 1, "sha256": ""}}, FilesError)
