"""Rows 23, 24, 29, 30, 33 and 35 of the fault matrix: runs that are killed, resumed, replaced. In depth in test_resume.py."""

import json
import os
import shutil
import signal

import pytest

from lora_ft.core.storage import manifest
from tests.helpers.command import TRAIN, cli, files, refused, refused_untouched, settings, start, train, training
from tests.helpers.tiny import write_base, write_reviews

RESUME = (*TRAIN, "--resume")
ADAPTER = "out/adapter_model.safetensors"
TIMES = {"seconds", "tokens_per_second", "peak_memory_mb"}


def logged(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same(folder, prepared) -> None:
    """The run ended as one that was left in peace: log, adapter, optimizer and random states."""
    assert logged(folder) == logged(prepared)
    for name in (ADAPTER, "out/checkpoints/step-12/state.safetensors"):
        assert (folder / name).read_bytes() == (prepared / name).read_bytes()


def steps(folder) -> list[int]:
    return sorted(int(p.name[5:]) for p in (folder / "out/checkpoints").glob("step-*"))


@pytest.fixture
def stopped(folder):
    """The run as if it had been killed right before its adapter landed."""
    for path in (folder / "out").iterdir():
        if path.is_file() and path.name != "log.jsonl":
            path.unlink()
    return folder


# ---- 23: kill -9; at every moment in scripts/kill_test.py ----


def test_killed_it_needs_nothing_but_resume(fresh, prepared):
    command = start(fresh, *RESUME)
    command.wait_for(lambda: list((fresh / "out/checkpoints").glob("step-*")))
    command.send(signal.SIGKILL)
    assert command.end().code == -signal.SIGKILL
    assert steps(fresh) and not (fresh / "out/lora_ft.json").exists()
    for command in (("eval",), ("merge", "--adapter", "out")):
        refused_untouched(fresh, 4, "unfinished", "--resume", f"step-{steps(fresh)[-1]}", command=command)
    ended = cli(fresh, *RESUME)
    assert ended.code == 0 and "resuming after step" in ended.err, ended
    same(fresh, prepared)


def test_killed_before_its_first_checkpoint_it_begins_at_step_0(fresh, prepared):
    command = start(fresh, *RESUME, "--set", "train.save_steps=9", "--set", "train.eval_steps=9")
    command.wait_for(lambda: (fresh / "out/log.jsonl").exists())
    command.send(signal.SIGKILL)
    command.end()
    assert not steps(fresh)
    ended = cli(fresh, *RESUME)
    assert ended.code == 0 and "starting at step 0" in ended.err, ended
    same(fresh, prepared)


# ---- 24: damaged checkpoints ----

FILES = ["lora_ft.json", "adapter_model.safetensors", "adapter_config.json", "state.safetensors", "state.json"]


def damage(path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "flip" else data[: len(data) // 2])
    if how == "delete":
        path.unlink()


@pytest.mark.parametrize(("name", "how"), [*((name, "delete") for name in FILES), *((name, "cut") for name in FILES)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stopped, prepared, name, how):
    before, newest = steps(stopped)[-2:]
    damage(stopped / f"out/checkpoints/step-{newest}/{name}", how)
    ended = cli(stopped, *RESUME)
    assert ended.code == 0 and f"out/checkpoints/step-{newest}" in ended.err, ended
    assert f"resuming after step {before} of" in ended.err
    same(stopped, prepared)


@pytest.mark.parametrize("name", FILES[1:])
def test_one_bit_is_enough(stopped, name):
    before, newest = steps(stopped)[-2:]
    damage(stopped / f"out/checkpoints/step-{newest}/{name}", "flip")
    ended = cli(stopped, *RESUME)
    assert ended.code == 0 and f"resuming after step {before} of" in ended.err, ended


def test_without_a_whole_checkpoint_nothing_is_begun(stopped):
    for path in (stopped / "out/checkpoints").glob("step-*/state.json"):
        path.unlink()
    refused_untouched(stopped, 6, "out", "checkpoints", "--overwrite", command=RESUME)
    refused_untouched(stopped, 6, "--resume", "--overwrite", command=TRAIN)


# ---- 29: an earlier run, files of others ----


def test_an_earlier_run_is_not_replaced_unasked(folder):
    refused_untouched(folder, 6, "out", "--resume", "--overwrite")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("train.learning_rate=fast", 2),
        ("data.train=no.jsonl", 3),
        ("data.prompt={no_such}", 3),
        ("model.name=./no", 4),
        ("adapter.modules=[no_such]", 4),
        ("train.report_to=[neptune]", 2),
    ],
)
def test_overwrite_with_a_mistake_deletes_nothing(folder, change, code):
    refused_untouched(folder, code, command=(*training(change), "--overwrite"))


def test_files_of_others_stay(folder):
    mine = ["out/mine.txt", "out/checkpoints/mine.txt", f"out/checkpoints/step-{steps(folder)[0]}/mine.txt"]
    for name in (*mine, "out/checkpoints/step-x/mine.txt", "out/tensorboard/mine.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    ended = train(folder, "train.save_total_limit=1", flags=["--overwrite"])
    assert ended.code == 0, ended
    left = {k: v for k, v in files(folder).items() if k.endswith("mine.txt")}
    assert len(left) == 5 and set(left.values()) == {b"mine"}, left
    assert {*mine[:2], "out/checkpoints/step-x/mine.txt", "out/tensorboard/mine.txt"} <= left.keys()


def test_what_is_not_a_runs_is_not_written_over(fresh):
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "log.jsonl"):
        shutil.rmtree(fresh / "out", ignore_errors=True)
        (fresh / "out").mkdir()
        (fresh / "out" / name).write_text("mine")
        for command in (TRAIN, (*TRAIN, "--overwrite")):
            refused_untouched(fresh, 6, "out", name, command=command)


def test_resume_and_overwrite_together(folder):
    refused_untouched(folder, 2, "--resume", "--overwrite", command=(*RESUME, "--overwrite"))


# ---- 30: two runs into one output ----


def test_two_runs_into_one_output(fresh):
    first = start(fresh, *training("train.num_train_epochs=500"))
    first.wait_for(lambda: (fresh / "out/log.jsonl").exists())
    for flags in ([], ["--resume"], ["--overwrite"]):
        (fresh / "second").mkdir()
        for name in ("base", "train.jsonl", "eval.jsonl", "config.yaml", "out"):
            (fresh / "second" / name).symlink_to(fresh / name)  # another folder for what it says
        refused(train(fresh / "second", flags=flags), 6, "out", f"pid {first.pid}")
        shutil.rmtree(fresh / "second")
    first.send(signal.SIGTERM)
    assert first.end().code == 143
    assert not (fresh / "out/.lock").exists()


# ---- 33: resuming after a change ----


@pytest.mark.parametrize(
    "changes",
    [
        ["train.seed=1"],
        ["train.batch_size=4"],
        ["adapter.rank=2", "adapter.alpha=3"],
        ["adapter.targets=[q]"],
        ["train.learning_rate=1e-3"],
        ["train.eval_steps=0.5"],
        ["train.early_stopping_patience=2"],
        ["data.train=eval.jsonl"],
        ["data.max_length=100"],
        ["model.dtype=bfloat16"],
    ],
)
def test_another_result_is_refused_with_each_difference(stopped, changes):
    names = [change.split("=")[0] for change in changes]
    refused_untouched(stopped, 2, *(f"{name}: was " for name in names), command=(*training(*changes), "--resume"))


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_other_data_of_the_same_name(stopped, name):
    write_reviews(stopped / name, 30)
    refused_untouched(stopped, 3, f"data.{name.partition('.')[0]}", command=RESUME)


def test_another_base_of_the_same_name(stopped):
    shutil.rmtree(stopped / "base")
    write_base(stopped / "base", seed=3)
    refused_untouched(stopped, 4, "fingerprint", command=RESUME)


def test_what_changes_only_rounding_is_a_warning(stopped):
    shutil.rmtree(stopped / "out/checkpoints/step-12")
    ended = train(stopped, "train.micro_batch_tokens=64", flags=["--resume"])
    assert ended.code == 0 and "warning: train.micro_batch_tokens: was" in ended.err, ended


def test_what_changes_nothing_goes_on(stopped, prepared):
    shutil.rmtree(stopped / "out/checkpoints/step-12")
    (stopped / "out").rename(stopped / "moved")
    ended = train(stopped, "output=moved", "train.report_to=[tensorboard]", flags=["--resume"])
    assert ended.code == 0 and "warning" not in ended.err, ended
    (stopped / "moved").rename(stopped / "out")
    same(stopped, prepared)


def test_a_finished_run(folder):
    before = files(folder)
    ended = cli(folder, *RESUME)
    assert ended.code == 0 and "already finished" in ended.err, ended
    assert files(folder) == before
    longer = train(folder, "train.num_train_epochs=3", flags=["--resume"])
    assert longer.code == 0 and "18 steps instead of 12" in longer.err and "schedule" in longer.err, longer
    refused_untouched(folder, 2, "12", "18", command=(*training("train.num_train_epochs=2"), "--resume"))


# ---- 35: modes ----


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_modes_follow_the_umask(fresh, umask, mode):
    assert train(fresh, "train.max_steps=2", before=lambda: os.umask(umask)).code == 0
    assert cli(fresh, "merge", "--adapter", "out", before=lambda: os.umask(umask)).code == 0
    made = [p for name in ("out", "out-merged") for p in (fresh / name).rglob("*") if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in made} == {mode}


# ---- a damaged best checkpoint ----

EVERY_STEP = settings(
    train__save_total_limit="null", train__save_steps=1, train__eval_steps=6, train__logging_steps=100
)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_damaged_best_checkpoint_is_noticed_at_the_start(fresh, earlier):
    command = (*TRAIN, *EVERY_STEP)
    begun = start(fresh, *command)
    begun.wait_for(lambda: (fresh / "out/checkpoints/step-7").exists())
    begun.send(signal.SIGTERM)
    assert begun.end().code == 143
    damage(fresh / "out/checkpoints/step-6/adapter_model.safetensors", "cut")
    for step in range(1, 1 if earlier else 6):
        shutil.rmtree(fresh / f"out/checkpoints/step-{step}")
    ended = cli(fresh, *command, "--resume")
    assert ended.code == 0 and "out/checkpoints/step-6, is damaged" in ended.err, ended
    assert ("resuming after step 5 of" in ended.err) == earlier
    assert ("takes its place" in ended.err) != earlier
    if earlier:  # as if nothing had happened
        assert cli(fresh, *command, "--set", "output=whole").code == 0
        adapter = "adapter_model.safetensors"
        assert (fresh / "out" / adapter).read_bytes() == (fresh / "whole" / adapter).read_bytes()


@pytest.mark.parametrize(
    "keys, value",
    [
        (("scheduler",), None),  # seen when it is read
        (("random", "python"), [3, [1, 2], None]),  # and these when it is restored
        (("groups", 0, "betas"), "ab"),
    ],
)
def test_a_state_that_is_not_of_the_run(folder, keys, value):
    """Its manifest agrees with it, as if another tool had written both."""
    step = folder / "out/checkpoints/step-12"
    content = json.loads((step / "state.json").read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (step / "state.json").write_text(json.dumps(content))
    record = json.loads((step / "lora_ft.json").read_text())
    record["files"] |= manifest(step, ["state.json"])
    (step / "lora_ft.json").write_text(json.dumps(record))
    ended = train(folder, "train.num_train_epochs=3", flags=["--resume"])
    refused(ended, 6, "state.json")


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoints/step-9"])
def test_resuming_changes_nothing_through_a_link(folder, name):
    """The log is cut back, and the oldest checkpoint removed: what a link leads to may be anyone's."""
    (folder / "out" / name).rename(folder / "elsewhere")
    (folder / "out" / name).symlink_to(folder / "elsewhere")
    more = [*RESUME, *settings(train__num_train_epochs=3)]
    refused_untouched(folder, 6, f"out/{name}: a link", command=more)
