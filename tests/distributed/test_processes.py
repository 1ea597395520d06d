"""Runs of several processes: the same losses and adapter as one process, each message once, all end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, ModelError, variable_behind
from lora_ft.data.batches import RowPacking, Shard, StepPlan, split_evenly
from lora_ft.distributed import launch, processes
from lora_ft.distributed.environment import with_accelerate_settings
from lora_ft.distributed.sharding import load_sharded
from lora_ft.evaluation.references import EvalPrompts
from lora_ft.evaluation.texts import generate_texts
from lora_ft.methods.lora.inject import inject_lora, trainable
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base, load_tokenizer
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import supervised_loss
from lora_ft.nn.rows import Segment
from lora_ft.training import setup
from tests.helpers.command import Started, training
from tests.helpers.ranks import command, launched, ranks, train
from tests.helpers.tiny import CONFIG, write_base, write_run

EIGHTEEN = ("train.num_train_epochs=3",)  # steps
DROPOUT = ("adapter.dropout=0.2", *EIGHTEEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder in which one process has trained eighteen steps, into alone/."""
    made = write_run(tmp_path_factory.mktemp("run"))
    train(made, 1, "output=alone", *EIGHTEEN)
    return made


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def record(output: Path) -> dict:
    return json.loads((output / "lora_ft.json").read_text())


def assert_alike(one: Path, other: Path) -> None:
    """Equal losses to 1e-4 and equal adapters to 1e-5 (both with room for Adam, which enlarges rounding)."""
    assert len(log(one)) == len(log(other))
    for a, b in zip(log(one), log(other), strict=True):
        assert a["step"] == b["step"]
        names = {"loss", "grad_norm", "eval_loss", "eval_accuracy", "tokens", "supervised_tokens"} & a.keys()
        assert {name: a[name] for name in names} == pytest.approx({name: b[name] for name in names}, rel=1e-4)
    mine, theirs = (load_file(o / "adapter_model.safetensors") for o in (one, other))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)


# ---- the same result ----


@pytest.mark.parametrize("count", [2, 3])
def test_losses_and_adapter_equal_those_of_one_process(folder, count):
    output = f"output=together{count}"
    said = train(folder, count, output, *EIGHTEEN, "train.micro_batch_tokens=64")
    assert_alike(folder / "alone", folder / output.removeprefix("output="))
    made = record(folder / f"together{count}")
    assert made["machine"]["processes"] == count
    metrics, of_one = made["metrics"], record(folder / "alone")["metrics"]
    assert metrics["confusion"] == of_one["confusion"] and metrics["loss"] == pytest.approx(of_one["loss"], rel=1e-4)
    assert said.count("training: 18 steps") == said.count("done in") == 1  # rank 0 only


def test_more_processes_than_examples_in_a_step(folder):
    how = "train.batch_size=2", "train.max_steps=6", "model.quantization=int8"
    train(folder, 1, "output=two-alone", *how)
    train(folder, 3, "output=two-together", *how)
    assert_alike(folder / "two-alone", folder / "two-together")


@pytest.mark.parametrize("count", [2, 3])
def test_a_sharded_base_gives_the_same_result(folder, count):
    train(folder, count, f"output=sharded{count}", *EIGHTEEN, "trainer.fsdp=true", "train.micro_batch_tokens=40")
    assert_alike(folder / "alone", folder / f"sharded{count}")


@pytest.mark.parametrize("method", ["bottleneck", "prompt"])
def test_a_sharded_base_with_other_methods(tmp_path, method):
    write_run(tmp_path, config=CONFIG.replace("rank: 4, alpha: 8", f"method: {method}"))
    train(tmp_path, 1, "output=whole", "train.max_steps=6")
    train(tmp_path, 2, "output=sharded", "train.max_steps=6", "trainer.fsdp=true")
    assert_alike(tmp_path / "whole", tmp_path / "sharded")


def test_a_step_all_reduces_the_adapters_gradients_once_and_nothing_else(folder):
    def work():
        sent, real = [], dist.all_reduce
        dist.all_reduce = lambda tensor, *a, **k: (sent.append(tensor.numel() * tensor.element_size()), real(tensor))[1]
        processes.init_process_group("cpu", 60)
        model = load_base(resolve(str(folder / "base")))
        inject_lora(model, rank=4, seed=0)
        learned = list(trainable(model).values())
        total = torch.tensor(1.0 + processes.rank())
        learned[0].grad = torch.full_like(learned[0], 2.0 * processes.rank())  # the others have no gradient here
        processes.all_reduce_gradients(learned, total)
        assert sent == [4 * sum(p.numel() for p in learned) + 4], sent
        assert total == 3.0 and torch.equal(learned[0].grad, torch.full_like(learned[0], 2.0))
        assert all(p.grad is not None and not p.grad.any() for p in learned[1:])
        processes.destroy_process_group()

    assert ranks(2, work) == [0, 0]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_prompts_of_text_metrics_are_divided(folder, sharded):
    def work():
        processes.init_process_group("cpu", 60)
        base = resolve(str(folder / "base"))
        tokenizer = load_tokenizer(base)
        texts = ["the film", "a good bad movie that was", "it", "Review: sad", "great awful and it made me happy"]
        prompts = EvalPrompts(texts, tokenizer(texts)["input_ids"], [["x"]] * 5, 0)
        config = load_config(folder / "config.yaml", ["generation.max_new_tokens=6", "generation.batch_size=2"])
        alone = generate_texts(load_base(base), tokenizer, prompts, config)
        share = Shard(processes.rank(), processes.world_size(), padded=sharded)
        model = load_sharded(base, "float32", "cpu") if sharded else load_base(base)
        assert generate_texts(model, tokenizer, prompts, config, shard=share) == alone and len(set(alone)) == 5
        processes.destroy_process_group()

    assert ranks(3, work) == [0, 0, 0]


def test_large_gradients_are_reduced_in_buckets(monkeypatch):
    def work():
        processes.BUCKET_SIZE = 10
        processes.init_process_group("cpu", 60)
        tensors = [torch.full((n,), float(n)) for n in (3, 7, 8, 25, 1)]
        processes.all_reduce_sum(tensors)
        assert [t.tolist() for t in tensors] == [[2.0 * n] * n for n in (3, 7, 8, 25, 1)]

    assert ranks(2, work) == [0, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3", "mixtral", "gpt_neox", "bloom"])
def test_gradients_of_a_sharded_base_equal_those_of_an_unsharded_one(tmp_path, family):
    """With a chunked head too (more than 256 supervised tokens), and recomputed activations."""
    write_base(tmp_path / "base", family)
    base = resolve(str(tmp_path / "base"))

    def work():
        processes.init_process_group("cpu", 60)
        models = load_base(base), load_sharded(base, "auto", "cpu")
        ids = torch.randint(3, 200, (1, 300), generator=torch.Generator().manual_seed(0))
        positions, segments = torch.arange(20).repeat(15)[None], [Segment(20)] * 15
        for checkpointing in (False, True):
            grads = []
            for model in models:
                if not checkpointing:
                    inject_lora(model, ["q", "v"], 4, 8, seed=0)
                else:
                    model.gradient_checkpointing_enable()
                model.train()
                model.zero_grad()
                torch.manual_seed(0)  # of the model's own dropout
                isolation, keep = Isolation.detect(model, 20), torch.arange(299)
                with isolation.row(model, segments):
                    supervised_loss(model, ids, positions, keep, ids[0, 1:]).backward()
                grads.append({name: p.grad for name, p in trainable(model).items()})
            largest = max(g.abs().max() for g in grads[0].values())
            for name, grad in grads[0].items():
                torch.testing.assert_close(grads[1][name] / largest, grad / largest, atol=1e-5, rtol=0)
        processes.destroy_process_group()

    assert ranks(2, work) == [0, 0]


def test_each_process_keeps_a_shard_of_the_layers_in_their_dtype(tmp_path):
    write_base(tmp_path / "base")

    def work():
        processes.init_process_group("cpu", 60)
        model = load_sharded(resolve(str(tmp_path / "base")), "bfloat16", "cpu")
        inject_lora(model, ["q"], 4, 8)
        for name, p in model.named_parameters():
            if ".layers." in name and "lora_" not in name:
                assert p.to_local().numel() <= -(-p.numel() // 2) and p.dtype == torch.bfloat16, name
        assert all(p.dtype == torch.float32 for p in trainable(model).values())
        processes.destroy_process_group()

    assert ranks(2, work) == [0, 0]


# ---- checkpoints ----


def test_resuming_on_the_same_number_of_processes_ends_in_the_same_bits(folder):
    train(folder, 2, "output=parts", *DROPOUT, "train.max_steps=9", "train.lr_scheduler_type=constant")
    # a run that was stopped: the same length in its record
    train(folder, 2, "output=whole", *DROPOUT, "train.lr_scheduler_type=constant")
    train(folder, 2, "output=parts", *DROPOUT, "train.lr_scheduler_type=constant", flags=("--resume",))
    parts, whole = (load_file(folder / o / "adapter_model.safetensors") for o in ("parts", "whole"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_resuming_on_another_number_of_processes_warns_and_uses_the_same_examples(folder):
    train(folder, 2, "output=other", "train.max_steps=9", "train.lr_scheduler_type=constant")
    said = train(folder, 1, "output=other", "train.lr_scheduler_type=constant", *EIGHTEEN, flags=("--resume",))
    train(folder, 1, "output=other-alone", "train.lr_scheduler_type=constant", *EIGHTEEN)
    assert "processes 2 is now 1" in said
    assert log(folder / "other")[-1]["eval_loss"] == pytest.approx(
        log(folder / "other-alone")[-1]["eval_loss"], rel=1e-4
    )


# ---- how a step is divided ----


def sst2_like_lengths(n: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return (8 + torch.empty(n).exponential_(1 / 18, generator=generator).clamp(max=60)).int().tolist()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_parts_have_nearly_equal_tokens(count):
    lengths = sst2_like_lengths(16 * count)
    shares = split_evenly(lengths, count)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert 1 - sum(sums) / len(sums) / max(sums) < 0.03  # of a step's time is waiting


def test_the_processes_divide_each_step():
    lengths = sst2_like_lengths(50)
    rows = {"input_ids": [[1] * n for n in lengths], "labels": [[-100] * (n - 2) + [1, 1] for n in lengths]}
    data = datasets.Dataset.from_dict(
        rows | {"tokens": lengths, "supervised": [2] * 50, "where": [str(i) for i in range(50)]}
    )
    whole = StepPlan(data, 16, 1, None, RowPacking(64), 0)
    shares = [StepPlan(data, 16, 1, None, RowPacking(64), 0, Shard(rank, 3, padded=True)) for rank in range(3)]
    for step in range(len(whole)):
        parts = [plan[step] for plan in shares]
        for part in parts:
            assert {k: part[k] for k in ("total", "tokens", "rows")} == {
                k: whole[step][k] for k in ("total", "tokens", "rows")
            }
        assert len({len(part["micro"]) for part in parts}) == 1
        assert sum(len(m["keep"]) for part in parts for m in part["micro"]) == whole[step]["total"]


# ---- launchers ----


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "lora_ft", "train", "config.yaml", "--processes", "2"],
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lora_ft", "train", "config.yaml"],
        [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "-m",
            "lora_ft",
            "train",
            "config.yaml",
        ],
    ],
    ids=["--processes", "torchrun", "accelerate"],
)
def test_launchers_start_connected_processes(folder, launcher, request):
    output = f"launched-{request.node.callspec.id}"
    command = [sys.executable, *launcher, "--set", f"output={output}", *training(*EIGHTEEN)[2:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [output]
    assert record(folder / output)["machine"]["processes"] == 2
    assert_alike(folder / "alone", folder / output)


def test_other_commands_run_once_under_a_launcher(folder):
    said = command(folder, 2, "eval", "alone", "--json")
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    assert json.loads(line)["adapter"]["loss"] == pytest.approx(record(folder / "alone")["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "environment, word",
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK"),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
    ],
)
def test_unconnected_processes_are_refused(monkeypatch, environment, word):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=word):
        processes.init_process_group("cpu", 60)


def test_the_settings_of_accelerate_follow_the_rules_of_a_config(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "full.yaml").write_text(CONFIG.replace("rank: 4, alpha: 8", "method: full"))
    config = load_config(tmp_path / "config.yaml")
    configs = {"a": config, "b": config}
    assert with_accelerate_settings(configs) == configs
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for changed in with_accelerate_settings(configs).values():
        assert changed.trainer.bf16 and changed.trainer.fsdp and "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="accelerate's config: trainer.fsdp: shards a frozen base"):
        with_accelerate_settings({"": load_config(tmp_path / "full.yaml")})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "maybe")
    with pytest.raises(ValueError, match="maybe") as e:
        with_accelerate_settings(configs)
    assert variable_behind(e.value) == "ACCELERATE_USE_CPU=maybe"


def test_the_number_of_processes_to_start(monkeypatch):
    assert launch.processes_to_start(None, on_gpus=False) == 1
    assert launch.processes_to_start(3, on_gpus=False) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launch.processes_to_start(None, on_gpus=True) == 8
    assert launch.processes_to_start(None, on_gpus=False) == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.processes_to_start(None, on_gpus=True) == launch.processes_to_start(4, on_gpus=True) == 1
    with pytest.raises(ConfigError, match="started 4"):
        launch.processes_to_start(2, on_gpus=True)


# ---- all processes end together ----

LONG = CONFIG.replace("num_train_epochs: 2", "num_train_epochs: 4000, eval_steps: 100000, save_steps: 100000")


@pytest.fixture
def running(tmp_path):
    """`lora-ft train --processes 2` in the middle of its steps: (the launcher, its two processes, its folder)."""
    folder = write_run(tmp_path, config=LONG)
    launcher = launched(folder, "train", "config.yaml", "--processes", "2")
    launcher.wait_for((folder / "out/log.jsonl").exists)
    yield launcher, children(launcher.pid), folder
    if psutil.pid_exists(launcher.pid):  # a test has failed
        launcher.send(signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes of a run, in the order of their ranks."""
    return sorted(p.pid for p in psutil.Process(pid).children())


def end(launcher: Started, pids: list[int]) -> tuple[int, str]:
    """Its exit code and stderr; it must end in time, and leave no process behind."""
    ended = launcher.end(30)
    time.sleep(0.2)
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "an orphan"
    return ended.code, ended.err


class TestAllEndTogether:
    @pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_signal_to_the_launcher(self, running, signum, code):
        launcher, pids, folder = running
        assert len(pids) == 2
        launcher.send(signum)
        returned, said = end(launcher, pids)
        assert (returned, said.count("which is saved. Continue with")) == (code, 1), said
        assert "--processes 2 --resume" in said and "Traceback" not in said
        assert len(list((folder / "out/checkpoints").glob("step-*/lora_ft.json"))) == 1

    @pytest.mark.parametrize("which, signum, code", [(0, signal.SIGTERM, 143), (1, signal.SIGKILL, 1)])
    def test_a_signal_to_one_process(self, running, which, signum, code):
        launcher, pids, folder = running
        os.kill(pids[which], signum)
        returned, said = end(launcher, pids)
        assert returned == code and "Traceback" not in said and "this is a bug" not in said, said
        saved = list((folder / "out/checkpoints").glob("step-*/lora_ft.json"))
        assert len(saved) == (signum == signal.SIGTERM or which == 1)  # the main process saves, while it lives
        if signum == signal.SIGKILL:
            assert f"process {which} of 2 (counted from 0) was ended by SIGKILL" in said

    def test_a_killed_launcher_leaves_no_orphans(self, running):
        launcher, pids, _ = running
        launcher.send(signal.SIGKILL)
        assert launcher.end().code == -signal.SIGKILL
        until = time.monotonic() + 15
        while [pid for pid in pids if psutil.pid_exists(pid)]:
            assert time.monotonic() < until, "an orphan"
            time.sleep(0.1)


def test_an_error_of_all_processes_is_printed_once(tmp_path):
    folder = write_run(tmp_path)
    (folder / "train.jsonl").write_text('{"text": "a", "label": 7}\n')
    ended = launched(folder, "train", "config.yaml", "--processes", "2").end()
    assert ended.code == 3 and len(ended.err.strip().splitlines()) == 1, ended.err
    assert "train.jsonl:1" in ended.err and not (folder / "out").exists()


def test_an_error_of_one_process_ends_all(tmp_path):
    """A process other than the main one that can't read its base."""
    folder, load = write_run(tmp_path), setup.load_base

    def fail(*args, **options):
        if os.environ["RANK"] == "1":
            raise ModelError("no model here")
        return load(*args, **options)

    before = lambda: setattr(setup, "load_base", fail)  # noqa: E731
    ended = launched(folder, "train", "config.yaml", "--processes", "2", before=before).end()
    assert ended.code == ModelError.exit_code and "no model here" in ended.err and "process 1 of 2" in ended.err, ended
    assert "this is a bug" not in ended.err, ended.err
