"""A run that was stopped, anywhere and any number of times, ends in the same bits as one that was not."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_ft.commands.train import train
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, DataError, FilesError, ModelError
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.training.resume import check_data
from tests.helpers.tiny import write_base, write_reviews, write_run

TIMES = {"seconds", "tokens_per_second", "peak_memory_mb"}
SETTINGS = [
    "train.loraplus_ratio=2",
    'adapter.rank_pattern={"0": 3}',
    "adapter.dropout=0.1",
    "adapter.dora=true",
    "train.micro_batch_tokens=32",
    "train.logging_steps=5",
    "train.save_steps=3",
    "train.eval_steps=4",
    "data.max_eval_examples=8",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("base"), "gpt2")  # whose own dropout draws random numbers too


@pytest.fixture(scope="module")
def whole(base):
    """The output of an uninterrupted run."""
    run(base)
    (base / "out").rename(base / "whole")
    return base / "whole"


@pytest.fixture
def folder(base, tmp_path):
    for name in ("base", "train.jsonl", "eval.jsonl", "config.yaml"):
        (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, tmp_path / name)
    return tmp_path


def run(folder: Path, *more: str, resume: bool = False, overwrite: bool = False) -> None:
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(load_config("config.yaml", [*SETTINGS, *more]), resume=resume, overwrite=overwrite)
    finally:
        os.chdir(here)


def stop_at(monkeypatch, check: int) -> None:
    """A signal that arrives before the check-th look for one."""
    count = 0

    def look(self):
        nonlocal count
        count += 1
        if count == check:
            raise Stopped(signal.SIGTERM, self.hint)

    monkeypatch.setattr(Stopper, "check", look)


def until_done(go: Callable[..., None], monkeypatch, every: int) -> int:
    """Stop `go(resume=...)` at every `every`-th look until it ends; how often it was stopped."""
    for stops in range(100):
        stop_at(monkeypatch, every)
        try:
            go(resume=stops > 0)
        except Stopped:
            continue
        monkeypatch.undo()
        return stops
    raise AssertionError("the run makes no headway")


def log(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same(output: Path, whole: Path) -> None:
    assert log(output) == log(whole)
    assert (output / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    last = "checkpoints/step-12/state.safetensors"
    assert (output / last).read_bytes() == (whole / last).read_bytes()


@pytest.mark.parametrize("every", [11, 17, 37, 50])
def test_stopped_again_and_again_it_ends_in_the_same_bits(folder, whole, monkeypatch, every):
    stops = until_done(partial(run, folder), monkeypatch, every)
    assert stops >= 1
    same(folder / "out", whole)


@pytest.mark.parametrize("check", range(20, 34, 2))
def test_stopped_within_a_step_or_an_evaluation(folder, whole, monkeypatch, check):
    stop_at(monkeypatch, check)
    with pytest.raises(Stopped, match="--resume"):
        run(folder)
    monkeypatch.undo()
    run(folder, resume=True)
    same(folder / "out", whole)


def test_an_evaluation_on_start_is_not_repeated(folder, monkeypatch):
    settings = "trainer.eval_on_start=true", "model.quantization=nf4"
    run(folder, *settings, "output=straight")
    stop_at(monkeypatch, 60)
    with pytest.raises(Stopped):
        run(folder, *settings)
    monkeypatch.undo()
    run(folder, *settings, resume=True)
    same(folder / "out", folder / "straight")


def test_killed_after_a_checkpoint_it_repeats_what_came_after(folder, whole, monkeypatch):
    """As after kill -9: the log and nothing else is ahead of the newest checkpoint."""
    stop_at(monkeypatch, 60)
    with pytest.raises(Stopped):
        run(folder)
    monkeypatch.undo()
    newest = sorted((folder / "out/checkpoints").iterdir(), key=lambda p: int(p.name[5:]))[-1]
    shutil.rmtree(newest)
    with (folder / "out/log.jsonl").open("a") as f:
        f.write('{"step": 99, "loss": 1.0}\n')
    run(folder, resume=True)
    same(folder / "out", whole)


def test_a_signal_before_the_first_step_leaves_nothing(folder, monkeypatch):
    stop_at(monkeypatch, 1)
    with pytest.raises(Stopped, match="nothing to save"):
        run(folder)
    assert not (folder / "out/checkpoints").exists()


def test_resume_without_anything_begins_at_step_0(folder, whole, capsys):
    run(folder, resume=True)
    assert "starting at step 0" in capsys.readouterr().err
    same(folder / "out", whole)


@pytest.fixture
def stopped(folder, monkeypatch):
    """A run stopped after some checkpoints."""
    stop_at(monkeypatch, 60)
    with pytest.raises(Stopped):
        run(folder)
    monkeypatch.undo()
    return folder


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(stopped, whole, capsys):
    newest = sorted((stopped / "out/checkpoints").iterdir(), key=lambda p: int(p.name[5:]))[-1]
    state = bytearray((newest / "state.safetensors").read_bytes())
    state[-1] ^= 1  # one bit
    (newest / "state.safetensors").write_bytes(state)
    run(stopped, resume=True)
    assert f"skipped checkpoint out/checkpoints/{newest.name}" in capsys.readouterr().err
    same(stopped / "out", whole)


def test_only_damaged_checkpoints_are_an_error(stopped):
    for checkpoint in (stopped / "out/checkpoints").iterdir():
        (checkpoint / "lora_ft.json").unlink()
    with pytest.raises(FilesError, match="all 2 checkpoints are damaged"):
        run(stopped, resume=True)


def test_an_adapter_without_checkpoints_is_an_error(folder, whole):
    shutil.copytree(whole, folder / "out")
    shutil.rmtree(folder / "out/checkpoints")
    with pytest.raises(FilesError, match="no checkpoints"):
        run(folder, "train.num_train_epochs=3", resume=True)


def test_what_would_change_the_result_is_refused_with_each_difference(stopped):
    with pytest.raises(ConfigError, match="train.seed: was 0, is 1") as e:
        run(stopped, "train.seed=1", "adapter.rank=2", resume=True)
    assert "adapter.rank: was 4, is 2" in str(e.value)


def test_what_changes_only_rounding_is_a_warning(stopped, capsys):
    run(stopped, "train.micro_batch_tokens=128", resume=True)
    assert "micro_batch_tokens: was 32, is 128" in capsys.readouterr().err


def test_what_changes_nothing_goes_on(stopped, whole):
    (stopped / "out").rename(stopped / "moved")
    run(stopped, "output=moved", "train.report_to=[]", resume=True)
    same(stopped / "moved", whole)


def test_other_content_is_refused_with_what_differs(stopped):
    write_reviews(stopped / "train.jsonl", 47)
    with pytest.raises(DataError, match=r"data.train has .*: 48 rows, now 47, train.jsonl is other\. Restore"):
        run(stopped, resume=True)
    lines = write_reviews(stopped / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6].replace("film", "book")
    (stopped / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r'train.jsonl:7 is the first row that differs: its prompt was "Review: the film .*book'
    ):
        run(stopped, resume=True)


def test_eval_data_that_the_record_lacks_is_refused():
    examples = SimpleNamespace(report=SimpleNamespace(content="c", sha256="s", rows=1, files={}), texts=[])
    record = {"tokenizer": "t", "data": {"train": {"content": "c", "sha256": "s"}}}
    with pytest.raises(DataError, match="data.eval has changed"):
        check_data(record, "t", examples, {"": examples})


def test_another_base_is_refused(stopped):
    shutil.rmtree(stopped / "base")
    write_base(stopped / "base", "gpt2", seed=1)
    with pytest.raises(ModelError, match="fingerprint"):
        run(stopped, resume=True)


def test_a_finished_run_says_so(folder, whole, capsys):
    shutil.copytree(whole, folder / "out")
    before = (folder / "out/log.jsonl").read_bytes()
    run(folder, resume=True)
    assert "already finished" in capsys.readouterr().err
    assert (folder / "out/log.jsonl").read_bytes() == before


def test_a_finished_run_can_be_made_longer(folder, whole, capsys):
    shutil.copytree(whole, folder / "out")
    run(folder, "train.num_train_epochs=3", resume=True)
    assert "longer now, 18 steps instead of 12" in capsys.readouterr().err
    lines = log(folder / "out")
    assert lines[-1]["step"] == 18 and lines[: len(log(whole))] == log(whole)
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert rates[15] > rates[18] > 0
    with pytest.raises(ConfigError, match="fewer"):
        run(folder, "train.num_train_epochs=1", resume=True)


def test_early_stopping_and_best_survive_a_stop(folder, base, monkeypatch):
    more = ["train.early_stopping_patience=2", "train.eval_steps=1", "train.learning_rate=1.0"]
    run(folder, *more, "output=straight")
    for stops in range(30):
        stop_at(monkeypatch, 12)
        try:
            run(folder, *more, resume=stops > 0)
        except Stopped:
            continue
        break
    assert stops > 1
    assert log(folder / "out") == log(folder / "straight")
    ours, theirs = (json.loads((folder / o / "lora_ft.json").read_text()) for o in ("out", "straight"))
    assert (ours["step"], ours["steps"], ours["metrics"]) == (theirs["step"], theirs["steps"], theirs["metrics"])
