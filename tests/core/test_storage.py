"""Files are written completely or not at all, with the umask's modes; what is read is checked."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_ft.core import storage
from lora_ft.core.errors import DataError, FilesError, ModelError


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(tmp_path, umask):
    storage.write_file(tmp_path / "text", "é")
    storage.write_json(tmp_path / "json", {"b": 1, "a": [2]})
    storage.write_tensors(tmp_path / "tensors", {"a": torch.arange(3.0)}, {"format": "pt"})
    with storage.atomic_folder(tmp_path / "folder") as staged:
        storage.write_file(staged / "inside", b"x")
    for name in ("text", "json", "tensors", "folder/inside"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "json", "tensors", "text"]
    assert (tmp_path / "text").read_bytes() == "é".encode()
    assert storage.read_json(tmp_path / "json", DataError) == {"b": 1, "a": [2]}
    assert torch.equal(storage.read_tensors(tmp_path / "tensors")["a"], torch.arange(3.0))


def test_a_name_that_is_not_utf8_is_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.csv")
    storage.write_json(tmp_path / "json", {"train": name})
    storage.append_line(tmp_path / "log.jsonl", {"train": name})
    for file in ("json", "log.jsonl"):
        assert storage.read_json(tmp_path / file, DataError) == {"train": name}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    storage.write_file(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FilesError, match=r"disk is full \(3 bytes needed, \d+ free\)"):
        storage.write_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_missing_folder_is_a_files_error(tmp_path):
    with pytest.raises(FilesError, match="No such file or directory"):
        storage.write_file(tmp_path / "none" / "f", "x")
    with pytest.raises(FilesError, match="none"):
        storage.write_tensors(tmp_path / "none" / "f", {"a": torch.zeros(1)})


def test_atomic_folder_is_all_or_nothing(tmp_path):
    target = tmp_path / "a" / "out"
    with pytest.raises(RuntimeError), storage.atomic_folder(target) as staged:
        (staged / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with storage.atomic_folder(target) as staged:
        assert staged.name.startswith(".out.partial-") and not target.exists()
        (staged / "whole").write_text("x")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    with pytest.raises(FilesError, match="exists already"), storage.atomic_folder(target):
        pass
    assert (target / "whole").read_text() == "x"


def test_a_folder_created_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FilesError, match="in the meantime"), storage.atomic_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_running_one_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.partial-{dead.pid}").mkdir()
    (tmp_path / f".out.partial-{os.getppid()}").mkdir()
    (tmp_path / ".out.partial-notes").mkdir()
    with storage.atomic_folder(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".out.partial-{os.getppid()}", ".out.partial-notes", "out"]
    )
    for process in (dead.pid, os.getppid(), "notes"):
        (tmp_path / f".a.gguf.tmp-{process}").write_text("a part")
    storage.write_file(tmp_path / "a.gguf", "all")
    assert sorted(p.name for p in tmp_path.glob("*a.gguf*")) == sorted(
        [f".a.gguf.tmp-{os.getppid()}", ".a.gguf.tmp-notes", "a.gguf"]
    )


@pytest.mark.parametrize(
    "content, why",
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b" " * (storage.JSON_LIMIT + 1), "larger than 16 MiB"),
        (b"[1]", "holds a list"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_forged_json(tmp_path, content, why):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=f"x.json.*{why}"):
        storage.read_json(tmp_path / "x.json", DataError)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(ModelError, match="x.json.*No such file"):
        storage.read_json(tmp_path / "x.json", ModelError)


def test_damaged_tensors_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    storage.write_tensors(path, {"a": torch.arange(100.0)})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50], whole[:4], b"", b"\xff" * 8 + whole[8:], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="a.safetensors"):
            storage.read_tensors(path)
    path.unlink()
    with pytest.raises(ModelError, match="a.safetensors"):
        storage.read_tensors(path)


def test_the_manifest_finds_every_change(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (tmp_path / name).write_text("12345")
    entries = storage.manifest(tmp_path, ["b", "a", "sub/c"])
    assert list(entries) == ["a", "b", "sub/c"]
    assert entries["a"] == {
        "size": 5,
        "sha256": "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5",
    }
    storage.verify_manifest(tmp_path, {**entries, "log.jsonl": None}, ModelError)
    (tmp_path / "a").write_text("12346")
    with pytest.raises(ModelError, match="a: changed.*SHA-256"):
        storage.verify_manifest(tmp_path, entries, ModelError)
    (tmp_path / "a").write_text("123456")
    with pytest.raises(ModelError, match="a: changed.*6 bytes, was 5"):
        storage.verify_manifest(tmp_path, entries, ModelError)
    (tmp_path / "a").unlink()
    with pytest.raises(FilesError, match="a: missing"):
        storage.verify_manifest(tmp_path, entries, FilesError)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "", "..\\secret"])
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("12345")
    entry = {"size": 5, "sha256": storage.sha256(tmp_path / "secret")}
    with pytest.raises(ModelError, match="leads out of the folder"):
        storage.verify_manifest(folder, {name: entry}, ModelError)


def test_missing_space_is_reported_with_both_figures(tmp_path):
    storage.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(FilesError, match=rf"{2**70} bytes needed, \d+ free"):
        storage.require_space(tmp_path / "not" / "yet", 2**70)


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800"])
def test_a_name_that_no_file_can_have_is_missing(tmp_path, name):
    with pytest.raises(FilesError, match="missing or unreadable"):
        storage.verify_manifest(tmp_path, {name: {"size": 1, "sha256": ""}}, FilesError)
