"""Row 26 of the fault matrix: SIGTERM and SIGINT at every stage of every command. In depth, bit by bit: test_resume.py."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import lora_ft.commands.evaluate
import lora_ft.commands.train_run
import lora_ft.core.signals
import lora_ft.data.encode
import lora_ft.evaluation.scoring
import lora_ft.methods.lora.merge
import lora_ft.methods.lora.merge_shards
import lora_ft.methods.lora.method
import lora_ft.model.load
import lora_ft.training.saving
import lora_ft.training.setup
import lora_ft.training.step
from lora_ft.core import run_folder
from lora_ft.training.checkpoint import State, is_intact
from lora_ft.training.saving import Saver
from tests.helpers.command import TRAIN, cli, files, start

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
SIGNALS = pytest.mark.parametrize("signum", CODES, ids=["TERM", "INT"])


def stages(names):
    """Each stage with one of the two signals, in turn."""
    return pytest.mark.parametrize(
        ("stage", "signum"), [(name, list(CODES)[i % 2]) for i, name in enumerate(names)], ids=list(names)
    )


def at(place: object, name: str, call: int, signum: int, times: int = 1) -> Callable[[], None]:
    """What makes a command signal itself as it makes its `call`-th call of `place.name`."""

    def arm() -> None:
        original, count = getattr(place, name), 0

        def counted(*args, **options):
            nonlocal count
            count += 1
            if count == call:
                for _ in range(times):
                    os.kill(os.getpid(), signum)
            return original(*args, **options)

        setattr(place, name, counted)

    return arm


BEFORE_THE_FIRST_STEP = {
    "tokenizer": (lora_ft.training.setup, "load_tokenizer", 1),
    "encoding": (lora_ft.data.encode, "encode_pairs", 1),
    "loading": (lora_ft.model.load, "stored_weights", 1),
    "adapting": (lora_ft.methods.lora.method, "inject", 1),
    "the first step": (lora_ft.training.step, "supervised_loss", 1),
}
AFTER_IT = {
    "a step": (lora_ft.training.step, "supervised_loss", 5),
    "the step before a checkpoint": (lora_ft.training.step, "supervised_loss", 3),
    "an evaluation": (lora_ft.evaluation.scoring, "log_probabilities", 3),
    "saving": (State, "write", 2),
    "rotation": (lora_ft.training.saving, "rotate", 3),
    "the log": (lora_ft.commands.train_run, "append_line", 4),
    "the last step": (lora_ft.training.step, "supervised_loss", 12),
    "the last checkpoint": (State, "write", 4),
    "the end": (Saver, "finish", 1),
}


def whole_checkpoints(folder: Path) -> list[Path]:
    found = run_folder.checkpoint_folders(folder / "out")
    assert all(map(is_intact, found)), found
    return found


def nothing_half_written(folder: Path) -> None:
    left = [p for p in folder.rglob("*") if ".tmp-" in p.name or ".partial-" in p.name or p.name == ".lock"]
    assert not left, left


@stages(BEFORE_THE_FIRST_STEP)
def test_before_the_first_step_there_is_nothing_to_save(fresh, signum, stage):
    with (fresh / "train.jsonl").open("a") as data:  # rows that no cache has
        data.write(f'{{"text": "{stage} {signum}", "label": 0}}\n')
    before = files(fresh)
    ended = cli(fresh, *TRAIN, before=at(*BEFORE_THE_FIRST_STEP[stage], signum))
    assert ended.code == CODES[signum], ended
    assert "stopped" in ended.err and ended.err.rstrip().endswith("Continue with: lora-ft train config.yaml --resume")
    nothing_half_written(fresh)
    assert files(fresh) == before


@stages(AFTER_IT)
def test_after_it_the_last_whole_step_is_saved_and_going_on_is_exact(prepared, fresh, signum, stage):
    ended = cli(fresh, *TRAIN, before=at(*AFTER_IT[stage], signum))
    assert ended.code == CODES[signum], ended
    assert "lora-ft train config.yaml --resume" in ended.err
    nothing_half_written(fresh)
    assert whole_checkpoints(fresh)
    assert not (fresh / "out/lora_ft.json").exists()
    resumed = cli(fresh, *TRAIN, "--resume")
    assert resumed.code == 0, resumed
    for name in ("adapter_model.safetensors", "checkpoints/step-12/state.safetensors"):
        assert (fresh / "out" / name).read_bytes() == (prepared / "out" / name).read_bytes(), name


def test_with_overwrite_the_hint_is_resume_only_once_the_old_run_is_gone(folder):
    ended = cli(folder, *TRAIN, "--overwrite", before=at(lora_ft.methods.lora.method, "inject", 1, signal.SIGTERM))
    assert ended.code == 143 and ended.err.rstrip().endswith("lora-ft train config.yaml --overwrite")
    assert is_intact(folder / "out")
    ended = cli(folder, *TRAIN, "--overwrite", before=at(State, "write", 2, signal.SIGTERM))
    assert ended.code == 143 and ended.err.rstrip().endswith("lora-ft train config.yaml --resume")


@stages(["a step", "an evaluation", "saving"])
def test_a_second_signal_ends_at_once(fresh, signum, stage):
    ended = cli(fresh, *TRAIN, before=at(*AFTER_IT[stage], signum, times=2))
    assert ended.code == CODES[signum], ended
    whole_checkpoints(fresh)
    assert cli(fresh, *TRAIN, "--resume").code == 0


def test_from_outside_at_any_moment(fresh):
    draw, seconds = random.Random(0), 0.0
    for i in range(6):
        run = start(fresh, *TRAIN, "--resume", "--set", "train.num_train_epochs=300")
        time.sleep(draw.uniform(0.05, 1.5))
        signum, began = (signal.SIGTERM, signal.SIGINT)[i % 2], time.monotonic()
        run.send(signum)
        ended = run.end()
        seconds = max(seconds, time.monotonic() - began)
        assert ended.code in (CODES[signum], -signum), ended  # the latter: before the command had begun to listen
        whole_checkpoints(fresh)
    assert seconds < 10


@SIGNALS
def test_eval_and_merge(folder, signum):
    before = files(folder)
    for command, place in (
        (["eval", "--again"], (lora_ft.evaluation.scoring, "log_probabilities", 2)),
        (["eval", "--again"], (lora_ft.commands.evaluate, "load_base", 1)),
        (["merge", "--adapter", "out"], (lora_ft.methods.lora.merge_shards, "merged", 2)),
        (["merge", "--adapter", "out"], (lora_ft.methods.lora.merge, "compare_logits", 1)),
        (["check", "config.yaml"], (lora_ft.training.setup, "load_tokenizer", 1)),
    ):
        ended = cli(folder, *command, before=at(*place, signum))
        assert ended.code == CODES[signum] and ended.err.rstrip().endswith("stopped"), ended
        assert files(folder) == before and not (folder / "out-merged").exists()


def test_a_library_that_takes_the_stop_for_an_error_or_loses_it(fresh):
    def taken_for_an_error(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as e:
            raise ImportError("a module could not be loaded") from e

    def lost(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            time.sleep(60)

    for swallow in (taken_for_an_error, lost):

        def arm(swallow=swallow):
            lora_ft.training.setup.load_tokenizer = swallow
            lora_ft.core.signals.EXIT_SECONDS = 0.3
            lora_ft.training.setup.load_tokenizer = swallow
            lora_ft.core.signals.SECONDS = 0.3

        ended = cli(fresh, *TRAIN, before=arm)
        assert ended.code == 143 and ended.seconds < 10, ended


@SIGNALS
def test_while_torch_is_being_imported(fresh, signum):
    """A process of its own: the imports are the first seconds of every command."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "lora_ft",
        *TRAIN,
    ]  # a line on stderr for each import that ends
    process = subprocess.Popen(command, cwd=fresh, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(" torch." in line for line in process.stderr)  # stops reading at the first submodule of torch
    began = time.monotonic()
    process.send_signal(signum)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == CODES[signum], err
    assert "Traceback" not in err and time.monotonic() - began < 10


def test_a_killed_comparison_ends_its_run(fresh):
    command = [sys.executable, "-m", "lora_ft", "compare", "config.yaml", "--vary", "adapter.rank=2,4"]
    command += ["--set", "train.num_train_epochs=10000"]
    with (fresh / "stderr.txt").open("w") as stderr:
        compare = subprocess.Popen(command, cwd=fresh, stderr=stderr)
    try:
        until = time.monotonic() + 100
        while not list(fresh.glob("out-compare/runs/*/log.jsonl")):
            assert compare.poll() is None and time.monotonic() < until, (fresh / "stderr.txt").read_text()
            time.sleep(0.05)
        runs = psutil.Process(compare.pid).children(recursive=True)
    finally:
        compare.kill()
        compare.wait()
    _, alive = psutil.wait_procs(runs, timeout=30)
    for run in alive:
        run.kill()
    assert runs and not alive
