"""What file systems refuse: an operation that a mount lacks is left out, any other failure names the path."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from lora_ft.core import disk, paths, storage
from lora_ft.core.errors import FilesError, ModelError


def failing(monkeypatch, owner, name: str, number: int) -> None:
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, fail)


def write_all(folder: Path) -> None:
    storage.write_file(folder / "file", "new")
    storage.write_tensors(folder / "tensors", {"x": torch.ones(2)})
    with storage.atomic_folder(folder / "a" / "folder") as staged:
        (staged / "file").write_text("new")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "chmod")])
def test_a_mount_that_lacks_it_is_used_all_the_same(tmp_path, monkeypatch, owner, name, number):
    failing(monkeypatch, owner, name, number)
    write_all(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"file", "tensors", "a", "folder"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "replace"), (Path, "write_bytes"), (os, "open")])
def test_a_failure_names_the_path_and_keeps_what_was_there(tmp_path, monkeypatch, owner, name, number):
    (tmp_path / "file").write_text("old")
    with monkeypatch.context() as patch:
        failing(patch, owner, name, number)
        with pytest.raises(FilesError, match=r"/file: "):
            storage.write_file(tmp_path / "file", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("name", ["mkdir", "replace"])
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        failing(patch, Path, name, errno.EIO)
        with (
            pytest.raises(FilesError, match=r"/folder: .*Input/output error"),
            storage.atomic_folder(tmp_path / "folder"),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_pipes_and_devices_are_never_read_or_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name, kind in (("pipe", "a pipe"), ("null", "a device")):
        for use in (
            lambda path: storage.write_file(path, "x"),
            lambda path: storage.append_line(path, {}),
            lambda path: storage.read_json(path, FilesError),
        ):
            with pytest.raises(FilesError, match=f"/{name}: {kind}, not a file"):
                use(tmp_path / name)
    with pytest.raises(ModelError, match="a pipe"):
        storage.read_json(tmp_path / "pipe", ModelError)
    assert Path("/dev/null").is_char_device()


def test_no_place_for_temporary_files(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    with pytest.raises(FilesError, match="Set TMPDIR"):
        paths.temporary_folder()


def test_a_home_that_is_not_known(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])
    assert paths.local_path("~/x") == Path("~/x") and paths.local_path("~nobody-here/x") == Path("~nobody-here/x")


def test_windows_waits_for_a_file_that_another_program_has_open(tmp_path, monkeypatch):
    file, held, replace = tmp_path / "file", [True] * 2, Path.replace

    def replace_unless_held(source: Path, target: Path) -> Path:
        if held:
            held.pop()
            raise PermissionError(errno.EACCES, "Permission denied")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", replace_unless_held)
    monkeypatch.setattr(disk, "WINDOWS", True)
    monkeypatch.setattr(storage, "sync", lambda path: None)
    storage.write_file(file, "new")
    held += [True] * 1000
    monkeypatch.setattr(disk, "RENAME_SECONDS", 0.01)
    with pytest.raises(FilesError, match="/file: .*another program"):
        storage.write_file(file, "newer")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["file"]
