"""Surroundings that a command can't work in: special files, files of others, mounts without locks, no temporary folder."""

import errno
import fcntl
import os
import tempfile

import datasets
import pytest
from tensorboard.summary.writer import event_file_writer

from lora_ft.core import paths
from lora_ft.data import cache
from tests.helpers.command import TRAIN, cli, files, refused, refused_untouched, settings, train, without_rights
from tests.helpers.tiny import lora_ft


@pytest.mark.parametrize(
    "name, code",
    [
        ("config.yaml", 2),
        ("train.jsonl", 3),
        ("base/config.json", 4),
        ("base/tokenizer.json", 4),
        ("base/tokenizer_config.json", 4),
        ("base/model.safetensors", 4),
        ("base/generation_config.json", 4),
    ],
)
def test_a_pipe_where_a_file_belongs(fresh, name, code):
    (fresh / name).unlink(missing_ok=True)
    os.mkfifo(fresh / name)
    refused_untouched(fresh, code, name, "a pipe, not a file")


def test_a_device_where_a_file_belongs(fresh):
    for name, code in (("zero.jsonl", 3), ("zero.gguf", 4)):
        (fresh / name).symlink_to("/dev/zero")
        setting = {"data__train" if code == 3 else "model__name": name}
        refused(cli(fresh, "train", "config.yaml", *settings(**setting)), code, name, "a device, not a file")
    (fresh / "template.jinja").symlink_to("/dev/zero")
    chat = settings(data__chat_template="template.jinja", data__messages="messages", data__prompt="null")
    ended = cli(fresh, "check", "config.yaml", *chat, *settings(data__completion="null", data__label_names="null"))
    refused(ended, 2, "template.jinja", "a device")


@pytest.mark.parametrize("name", ["log.jsonl", ".lock", ".lock.pid"])
def test_a_pipe_in_the_output(fresh, name):
    (fresh / "out").mkdir()
    os.mkfifo(fresh / "out" / name)
    refused(train(fresh), 6, name, "a pipe, not a file")
    assert [p.name for p in (fresh / "out").iterdir()] == [name]


@pytest.mark.parametrize(
    "path, code",
    [("train.jsonl", 3), ("base/model.safetensors", 4), ("base/tokenizer.json", 4), ("base", 4)],
)
def test_a_file_of_someone_else(fresh, path, code):
    drop = without_rights(fresh)
    fresh.chmod(0o777)
    (fresh / "base/model.safetensors").chmod(0o644)
    mode = (fresh / path).stat().st_mode
    (fresh / path).chmod(0)
    ended = train(fresh, before=drop)
    (fresh / path).chmod(mode)
    refused(ended, code, path, "Permission denied")
    assert "no such" not in ended.err and "space" not in ended.err, ended.err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINTR])
def test_a_run_on_a_mount_without_locks(prepared, fresh, number):
    def no_locks():
        def flock(*_):
            raise OSError(number, os.strerror(number))

        fcntl.flock = flock

    ended = train(fresh, before=no_locks)
    assert ended.code == 0 and "warning: output out: its file system can't lock it" in ended.err, ended
    same = "out/adapter_model.safetensors"
    assert (fresh / same).read_bytes() == (prepared / same).read_bytes()
    assert not [name for name in files(fresh) if ".lock" in name]


def test_no_place_for_temporary_files(fresh, monkeypatch):
    # another test may have needed one; clearing the function's cache in the fork would remove this process's folder
    monkeypatch.setattr(cache, "_replacement", paths.temporary_folder)

    def nowhere():
        tempfile.tempdir, tempfile._candidate_tempdir_list = None, lambda: ["/proc/none"]
        datasets.config.HF_DATASETS_CACHE = fresh / "train.jsonl"

    refused(train(fresh, before=nowhere), 6, "no temporary folder", "TMPDIR")


def test_a_run_in_a_locale_without_utf8(fresh, monkeypatch):
    """Names of files, rows, template and output outside of ASCII; the terminal shows them escaped."""
    monkeypatch.setenv("LC_ALL", "POSIX")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    text = (fresh / "train.jsonl").read_text(encoding="utf-8").replace("film", "fílm")
    (fresh / "trüin.jsonl").write_text(text, encoding="utf-8")
    config = (fresh / "config.yaml").read_text(encoding="utf-8").replace("train.jsonl", "trüin.jsonl")
    (fresh / "config.yaml").write_text(config.replace("Review", "Revïew"), encoding="utf-8")
    ended = lora_ft("train", "config.yaml", "--set", "output=öut", "--set", "train.max_steps=1", cwd=fresh)
    assert ended.returncode == 0 and ended.stderr.isascii() and ended.stdout == "\\xf6ut\n", ended
    assert "Revïew" in (fresh / "öut/lora_ft.json").read_text(encoding="utf-8")


def test_names_that_are_not_utf8(folder):
    """Linux allows them; safetensors and Parquet can't open them. What needs neither works."""
    odd = os.fsdecode(b"o\xff")
    for old, new in (("base", odd), ("train.jsonl", f"{odd}.jsonl"), ("out", f"{odd}-out")):
        (folder / old).rename(folder / new)
    base = settings(model__name=odd)
    refused(cli(folder, *TRAIN, *base), 4, "o\\udcff: its name is not valid UTF-8")
    (folder / odd).rename(folder / "base")
    refused(
        cli(folder, *TRAIN, *settings(output=f"{odd}-out"), "--resume"), 6, "o\\udcff-out: its name is not valid UTF-8"
    )
    refused(cli(folder, "eval", f"{odd}-out"), 4, "o\\udcff-out: its name is not valid UTF-8")
    (folder / f"{odd}-out").rename(folder / "out")
    refused(cli(folder, "merge", "--adapter", "out", "--output", odd), 6, "o\\udcff: its name is not valid UTF-8")
    (folder / "data").mkdir()
    (folder / f"{odd}.jsonl").rename(folder / f"data/{odd}.parquet")
    refused(cli(folder, "check", "config.yaml", *settings(data__train="data")), 3, "o\\udcff.parquet: its name is not")
    (folder / f"data/{odd}.parquet").rename(folder / f"data/{odd}.jsonl")
    assert train(folder, "data.train=data", "output=other", "train.max_steps=1").code == 0


@pytest.mark.parametrize(
    "command, name",
    [
        (("merge", "--adapter", "out"), "fsync"),
        (("merge", "--adapter", "out"), "replace"),
        (("export", "out", "--to", "peft"), "mkdir"),
        (("export", "out", "--to", "gguf"), "replace"),
        (("export", "out", "--to", "gguf", "--merged"), "fsync"),
        (("report", "out"), "replace"),
        (("init", "new.yaml", "--model", "base", "--data", "train.jsonl"), "fsync"),
        (("compare", "config.yaml", "--vary", "adapter.rank=2", "--output", "compared"), "mkdir"),
        (("eval", "out", "--texts", "texts.jsonl", *settings(generation__metrics="[exact_match]")), "replace"),
    ],
)
def test_what_the_system_refuses_to_a_command_that_writes(folder, command, name):
    def failing():
        def fail(*_, **__):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        (folder / "cache/lora_ft").mkdir(parents=True)
        setattr(os, name, fail)

    before = files(folder)
    ended = cli(folder, *command, before=failing)
    refused(ended, 6, "Input/output error")
    assert {k: v for k, v in files(folder).items() if not k.startswith("cache/")} == before


def test_a_tracker_that_cannot_write(fresh):
    """TensorBoard writes in a thread of its own, whose traceback is not for users."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = lambda: setattr(event_file_writer.RecordWriter, "write", fail)  # noqa: E731
    refused(
        train(fresh, "train.report_to=[tensorboard]", before=before), 6, "out/tensorboard: can't be written (Input/"
    )
