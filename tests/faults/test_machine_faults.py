"""Rows 22, 25, 28, 39 and 42 of the fault matrix: numbers, disk, memory, and places that can't be written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import lora_ft.evaluation.evaluate
import lora_ft.training.setup
import lora_ft.training.step
from lora_ft.core import run_folder
from lora_ft.training.checkpoint import is_intact
from tests.helpers.command import TRAIN, cli, files, refused, refused_untouched, settings, train, without_rights

MERGE = ("merge", "--adapter", "out")


def good_checkpoints(folder: Path) -> list[str]:
    """The names of the checkpoints, all of which must be whole, finite and free of leftovers."""
    found = run_folder.checkpoint_folders(folder / "out")
    for checkpoint in found:
        assert is_intact(checkpoint)
        assert all(t.isfinite().all() for t in load_file(checkpoint / "adapter_model.safetensors").values())
    left = [p for p in folder.rglob(".*") if ".tmp-" in p.name or ".partial-" in p.name]
    assert not left, left
    return [p.name for p in found]


def goes_on_exactly(folder: Path, prepared: Path) -> None:
    """`--resume` ends in the bits of a run that met no fault."""
    assert cli(folder, *TRAIN, "--resume").code == 0
    for name in ("adapter_model.safetensors", "checkpoints/step-12/state.safetensors"):
        assert (folder / "out" / name).read_bytes() == (prepared / "out" / name).read_bytes(), name


def at_step(step: int, fault):
    """Puts `fault(loss)` in the place of a step's loss; a step is one micro-batch here."""

    def arm():
        original, count = lora_ft.training.step.supervised_loss, 0

        def loss(*args, **options):
            nonlocal count
            count += 1
            found = original(*args, **options)
            return fault(found) if count == step else found

        lora_ft.training.step.supervised_loss = loss

    return arm


# ---- 22: numbers ----


def spoilt_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (lambda loss: loss * float("nan"), "loss"),
        (lambda loss: loss * float("inf"), "loss"),
        (spoilt_gradient, "gradient"),
    ],
)
def test_numbers_that_leave_the_finite(prepared, fresh, fault, what):
    ended = cli(fresh, *TRAIN, before=at_step(8, fault))
    refused(ended, 5, "step 8", what, "train.jsonl:")
    assert good_checkpoints(fresh) == ["step-3", "step-6"]
    assert not (fresh / "out/adapter_model.safetensors").exists()
    assert '"step": 8' not in (fresh / "out/log.jsonl").read_text()
    goes_on_exactly(fresh, prepared)


def test_a_learning_rate_that_is_too_high(fresh):
    ended = train(fresh, "train.learning_rate=1e30", "train.save_steps=1", "train.warmup_steps=0")
    refused(ended, 5, "step ", "train.jsonl:", "learning_rate")
    good_checkpoints(fresh)
    assert not (fresh / "out/adapter_model.safetensors").exists()


def test_a_base_that_scores_nan(fresh):
    ended = train(fresh, "train.max_steps=1", before=lambda: setattr(lora_ft.evaluation.evaluate, "score", nan_score))
    refused(ended, 5, "eval.jsonl:7")


def nan_score(*_, **__):
    from lora_ft.core.errors import NumbersError

    raise NumbersError("eval.jsonl:7: the model's log-probabilities are not finite, so scores mean nothing.")


# ---- 25: a full disk ----


def test_a_write_that_the_system_refuses(fresh):
    """A limit on file sizes stands in for a full disk wherever nothing can be mounted."""
    before = files(fresh)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    refused(cli(fresh, *TRAIN, before=limit), 6, "File too large")
    assert before.items() <= files(fresh).items()
    assert not list((fresh / "out/checkpoints").glob("step-*"))


@pytest.fixture
def disk(tmp_path):
    """A function that makes a folder a small file system of its own, or changes its size; root only."""
    mounted = []

    def small(folder: Path, size: str) -> None:
        again = folder in mounted
        folder.mkdir(exist_ok=True)
        options = f"{'remount,' if again else ''}size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a file system: {done.stderr.decode().strip()}")
        if not again:
            mounted.append(folder)

    yield small
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def no_check():
    """As if the disk were filled by someone else between the check and the write."""
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(2**50, 0, 2**50)  # type: ignore[attr-defined]


EVERY_STEP = settings(train__save_steps=1, train__save_total_limit="null")


def test_a_disk_that_fills_up(prepared, fresh, disk):
    disk(fresh / "out", "1300k")  # some checkpoints, and the margin that is always kept
    ended = cli(fresh, *TRAIN, *EVERY_STEP)
    refused(ended, 6, "bytes needed", "free")
    found = good_checkpoints(fresh)
    assert 1 <= len(found) < 12
    disk(fresh / "out", "8m")
    assert cli(fresh, *TRAIN, *EVERY_STEP, "--resume").code == 0
    adapter = "out/adapter_model.safetensors"
    assert (fresh / adapter).read_bytes() == (prepared / adapter).read_bytes()


@pytest.mark.parametrize("size", ["8k", "40k", "100k", "160k", "200k", "240k", "280k"])
def test_a_disk_that_is_full_in_the_middle_of_a_write(fresh, disk, size):
    disk(fresh / "out", size)
    ended = cli(fresh, *TRAIN, *EVERY_STEP, before=no_check)
    refused(ended, 6, "out/")
    good_checkpoints(fresh)
    assert not (fresh / "out/lora_ft.json").exists()


def test_a_stop_on_a_full_disk(fresh, disk):
    disk(fresh / "out", "64k")
    ended = cli(fresh, *TRAIN, before=at_step(2, lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss))
    refused(ended, 6, "bytes needed", "free")
    assert good_checkpoints(fresh) == []


def test_files_that_may_not_grow(fresh):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # noqa: E731
    before = files(fresh)
    refused(cli(fresh, *TRAIN, before=limit), 6)
    assert good_checkpoints(fresh) == []
    assert {k: v for k, v in files(fresh).items() if k in before} == before


def test_a_merge_on_a_full_disk(folder, disk):
    disk(folder / "small", "100k")
    for before in (lambda: None, no_check):
        ended = cli(folder, *MERGE, "--output", "small/merged", before=before)
        refused(ended, 6, "small")
        assert not list((folder / "small").iterdir())


def test_a_data_cache_on_a_full_disk(fresh, disk):
    disk(fresh / "cache", "8k")

    def use_it():
        datasets.config.HF_DATASETS_CACHE = fresh / "cache"

    refused(cli(fresh, *TRAIN, before=use_it), 6, "cache", "HF_DATASETS_CACHE")


# ---- 28: an output that can't be ----


def no_model_yet():
    """The output is looked at before a model costs anyone's time."""

    def load_base(*_):
        raise AssertionError("the model was loaded")

    lora_ft.training.setup.load_base = load_base


def test_an_output_that_is_a_file(fresh):
    (fresh / "file").write_text("mine")
    for output in ("file", "file/inside", "nothing/../file"):
        refused_untouched(fresh, 6, "file", command=[*TRAIN, *settings(output=output)])


def test_an_output_that_is_read_only(fresh, disk):
    disk(fresh / "out", "1m")
    disk(fresh / "out", "1m,ro")
    refused(cli(fresh, *TRAIN, before=no_model_yet), 6, "output out", "Read-only", "--set output=")
    refused(train(fresh, "output=out/a/b", before=no_model_yet), 6, "output out/a/b", "Read-only")


def test_an_output_of_someone_else(fresh):
    drop = without_rights(fresh)
    (fresh / "out").mkdir()
    (fresh / "out").chmod(0o555)

    def before():
        drop()
        no_model_yet()

    refused(cli(fresh, *TRAIN, before=before), 6, "output out", "Permission denied")
    assert not list((fresh / "out").iterdir())


def test_a_merge_into_what_cannot_be_written(folder, disk):
    disk(folder / "ro", "1m")
    disk(folder / "ro", "1m,ro")
    refused(cli(folder, *MERGE, "--output", "ro/merged"), 6, "ro/merged", "Read-only")
    (folder / "file").write_text("mine")
    refused_untouched(folder, 6, "file", command=[*MERGE, "--output", "file/merged"])


# ---- 39: memory ----


def test_no_memory_for_a_step(prepared, fresh):
    """An allocation that the system refuses in earnest."""
    ended = cli(fresh, *TRAIN, before=at_step(8, lambda loss: torch.empty(2**46, dtype=torch.uint8)))
    refused(
        ended,
        7,
        "cannot allocate",
        "(67,108,864.0 MiB)",
        "MiB free on this machine",
        "train.micro_batch_tokens",
        "adapter.rank",
    )
    assert good_checkpoints(fresh) == ["step-3", "step-6"]
    goes_on_exactly(fresh, prepared)


def test_no_memory_on_a_gpu(fresh):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free."

    def refuse(loss):
        raise torch.OutOfMemoryError(said)

    refused(cli(fresh, *TRAIN, before=at_step(1, refuse)), 7, said, "train.micro_batch_tokens")


def leave(mebibytes: int):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + mebibytes * 2**20,) * 2)

    return limit


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit of a process's memory (ulimit -v)")
def test_no_memory_for_a_model(folder):
    """What is left is too little for a base of 73 MiB, or for a large adapter on it. The run that is there stays."""
    before = files(folder)
    config = AutoConfig.from_pretrained(folder / "base", intermediate_size=100_000)
    shutil.copytree(folder / "base", folder / "large")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "large")
    for command in (
        [*TRAIN, "--overwrite", *settings(model__name="large")],
        ["eval", "--base", "large", "--other-base"],
        [*MERGE, "--base", "large", "--other-base"],
    ):
        refused(cli(folder, *command, before=leave(48)), 7, "limit", "model.quantization")
    wide = settings(model__name="large", adapter__rank=65536, adapter__targets="[all]")
    ended = cli(folder, *TRAIN, "--overwrite", *wide, before=leave(600))
    refused(ended, 7, "cannot allocate", "bytes (", "left of this process's limit", "adapter.rank")
    shutil.rmtree(folder / "large")
    assert files(folder) == before


# ---- 42: other file systems, a cache that can't be written ----


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs /dev/shm, a second file system")
def test_an_output_on_another_file_system(prepared, fresh):
    output = Path("/dev/shm") / f"lora-ft-test-{os.getpid()}"
    (fresh / "out").symlink_to(output)
    output.mkdir()
    try:
        ended = cli(fresh, *TRAIN, before=at_step(5, lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss))
        assert ended.code == 143
        goes_on_exactly(fresh, prepared)
    finally:
        shutil.rmtree(output)


def test_a_cache_that_cannot_be_written(fresh):
    (fresh / "cache").write_text("a file where a folder should be")

    def use_it():
        datasets.config.HF_DATASETS_CACHE = fresh / "cache"

    assert train(fresh, "train.max_steps=1", before=use_it).code == 0
    assert (fresh / "cache").read_text() == "a file where a folder should be"


def test_a_home_that_cannot_be_written(fresh):
    """A process of its own: the libraries look for their folders as they are imported. Nobody can write below a file."""
    (fresh / "home").write_text("a file where a folder should be")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    env = kept | {"HOME": str(fresh / "home/none"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lora_ft", *TRAIN, *settings(train__max_steps=1)]
    done = subprocess.run(command, cwd=fresh, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and is_intact(fresh / "out")


def test_an_output_that_holds_a_model(fresh):
    """transformers would load an adapter beside a config.json as part of that model."""
    refused_untouched(fresh, 6, "contains a model", command=[*TRAIN, *settings(output="base")])


def test_several_processes_that_would_train_alone(fresh):
    refused(cli(fresh, *TRAIN, before=lambda: os.environ.update(WORLD_SIZE="2")), 2, "WORLD_SIZE")
    assert not (fresh / "out").exists()
