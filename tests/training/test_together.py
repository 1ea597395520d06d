"""Several configs trained together: each run is what it is alone, whatever the others do."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_ft.commands.train import raise_errors
from lora_ft.config.load import load_config, parse_config
from lora_ft.config.together import check_together
from lora_ft.core import signals
from lora_ft.core.errors import ConfigError, FilesError, NumbersError
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.distributed import processes
from lora_ft.methods.lora.inject import trainable
from lora_ft.nn.attention import Isolation
from lora_ft.training import joint_step
from lora_ft.training.joint_rows import RunGenerators, RunRows, RunStep, rows, tokens_of
from lora_ft.training.joint_step import JointModel
from lora_ft.training.setup import RunSetup
from lora_ft.training.together import Run, Together
from tests.helpers.command import Ended, cli, start
from tests.helpers.ranks import command
from tests.helpers.tiny import CONFIG, write_reviews, write_run

# ranks, targets, rates, batches, data, seeds, dropout, schedules, lengths of the runs and evaluations that differ
RUNS = {
    "a": {
        "adapter": {"rank": 2, "dropout": 0.1, "dora": True},
        "train": {"learning_rate": 1e-2, "batch_size": 4, "seed": 1},
    },
    "b": {
        "adapter": {"targets": ["all"]},
        "train": {"max_steps": 7, "eval_steps": 3},
        "data": {"train": "others.jsonl"},
    },
    "c": {
        "adapter": {"rank": 3, "dropout": 0.3, "targets": ["q"], "layers": [1]},
        "train": {
            "batch_size": 16,
            "max_steps": 15,
            "loraplus_ratio": 3.0,
            "lr_scheduler_type": "cosine",
            "early_stopping_patience": 1,
        },
    },
}
COMMON = {"micro_batch_tokens": 128, "logging_steps": 1, "max_steps": 10}


def write_configs(folder: Path, kind: str, changes: dict | None = None) -> list[str]:
    """A config for each of RUNS, KIND-a.yaml and so on, with outputs KIND-a and so on."""
    names = []
    for name, own in RUNS.items():
        config = yaml.safe_load(CONFIG)
        config["train"] |= COMMON
        for settings in (own, (changes or {}).get(name, {})):
            for section, values in settings.items():
                config[section] = config.get(section, {}) | values
        config["output"] = f"{kind}-{name}"
        names.append(f"{kind}-{name}.yaml")
        (folder / names[-1]).write_text(yaml.safe_dump(config))
    return names


def trained(folder: Path, kind: str, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run's log, of steps and evaluations, and its adapter."""
    output = folder / f"{kind}-{name}"
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines], load_file(output / "adapter_model.safetensors")


def assert_same(folder: Path, kind: str, other: str, names: str = "abc") -> None:
    for name in names:
        (losses, adapter), (losses_too, adapter_too) = trained(folder, kind, name), trained(folder, other, name)
        assert losses == pytest.approx(losses_too, abs=1e-5), name
        for key, tensor in adapter.items():
            assert torch.allclose(tensor, adapter_too[key], atol=1e-4), (name, key)


def together(folder: Path, *names: str, flags: tuple[str, ...] = ()) -> Ended:
    ended = cli(folder, "train", *names, *flags)
    assert ended.code == 0, ended.err
    return ended


def written_and_trained(folder: Path, family: str, changes: dict | None = None) -> Path:
    """A folder with the runs, trained one by one and together."""
    write_run(folder, family)
    write_reviews(folder / "others.jsonl", 31)
    for name in write_configs(folder, "alone", changes):
        assert cli(folder, "train", name).code == 0
    together(folder, *write_configs(folder, "together", changes))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written_and_trained(tmp_path_factory.mktemp("together"), "llama")


def test_each_run_is_the_one_that_it_is_alone(folder):
    assert_same(folder, "alone", "together")
    for name in RUNS:
        records = [
            json.loads((folder / f"{kind}-{name}" / "lora_ft.json").read_text()) for kind in ("alone", "together")
        ]
        assert records[0]["metrics"].keys() == records[1]["metrics"].keys()
        assert {p.name for p in (folder / f"alone-{name}").iterdir()} == {
            p.name for p in (folder / f"together-{name}").iterdir()
        }


# the first two have dropout of their own, the last its own code
@pytest.mark.parametrize("family, form", [("gpt2", None), ("opt", "int8"), ("bloom", "nf4")])
def test_other_families(family, form, tmp_path):
    short = {"train": {"max_steps": 3, "early_stopping_patience": None, "eval_steps": 2}}
    short = dict.fromkeys(RUNS, short | {"model": {"quantization": form}})
    assert_same(written_and_trained(tmp_path, family, short), "alone", "together")


def test_neither_their_order_nor_their_number_changes_a_run(folder):
    others = write_configs(folder, "reversed")
    together(folder, *others[:0:-1])
    assert_same(folder, "alone", "reversed", "cb")


def test_evaluations_that_fall_due_together_are_computed_together(folder, monkeypatch):
    evaluate, compute, notes = JointModel.log_probabilities, joint_step.log_probabilities, folder / "evaluated.txt"

    def note(text):
        with notes.open("a") as file:  # of a fork
            file.write(text)

    def noted_evaluate(self, waiting, check):
        note("".join("abc"[run.run] for run in waiting) + str(sum(len(run.micro) for run in waiting)))
        found = evaluate(self, waiting, check)
        note("\n")
        return found

    def noted_compute(*args, **kwargs):
        note(".")
        return compute(*args, **kwargs)

    monkeypatch.setattr(JointModel, "log_probabilities", noted_evaluate)
    monkeypatch.setattr(joint_step, "log_probabilities", noted_compute)
    due = {"train": {"max_steps": 6, "eval_steps": 3, "early_stopping_patience": None}}
    own = {"a": due, "b": due, "c": {"train": due["train"] | {"eval_steps": 2}}}
    together(folder, *write_configs(folder, "due", own))
    runs, rows, passes = zip(*re.findall(r"([abc]+)(\d+)(\.+)", notes.read_text()), strict=True)
    assert runs == ("c", "ab", "c", "abc")
    assert [len(p) == int(n) for p, n in zip(passes, rows, strict=True)] == [True, False, True, False]


def test_stopped_in_an_evaluation_they_resume_to_the_same_bits(folder, monkeypatch):
    compute, calls = joint_step.log_probabilities, itertools.count(1)

    def stopped(*args, **kwargs):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(*args, **kwargs)

    names = write_configs(folder, "evaluating")
    with monkeypatch.context() as patch:
        patch.setattr(joint_step, "log_probabilities", stopped)
        assert cli(folder, "train", *names).code == 128 + signal.SIGTERM
    together(folder, *names, flags=("--resume",))
    assert_same(folder, "together", "evaluating")


def test_an_evaluation_that_is_not_finite_ends_its_run_alone(folder, monkeypatch):
    compute = JointModel.log_probabilities

    def spoiled(self, waiting, check):
        found = compute(self, waiting, check)
        return {run: [values * math.nan for values in of] if run == 1 else of for run, of in found.items()}

    monkeypatch.setattr(JointModel, "log_probabilities", spoiled)
    ended = cli(folder, "train", *write_configs(folder, "spoiled"))
    assert ended.code == 5 and "1 of 3 runs failed: spoiled-b" in ended.err
    assert_same(folder, "alone", "spoiled", "ac")


def test_messages_say_whose_they_are(folder):
    shutil.rmtree(folder / "together-a", ignore_errors=True)
    ended = together(folder, "together-a.yaml", "together-b.yaml", flags=("--resume",))
    assert "together-b: already finished" in ended.err
    assert "together-a: step 10 of 10, eval: loss" in ended.err
    assert "compared in compare-report.html" in ended.err
    assert "together-a" in (folder / "compare-report.html").read_text()
    assert_same(folder, "alone", "together")


def test_killed_or_stopped_they_resume_to_the_same_bits(folder):
    names, moments = write_configs(folder, "stopped"), random.Random(7)
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        run = start(folder, "train", *names, "--resume")
        time.sleep(moments.uniform(0.5, 2.0))
        run.send(signum)
        assert run.end().code in (-signum, 128 + signum, 0)
    together(folder, *names, flags=("--resume",))
    for name in RUNS:
        (losses, adapter), (losses_then, adapter_then) = (
            trained(folder, kind, name) for kind in ("together", "stopped")
        )
        assert losses == losses_then
        assert all(torch.equal(tensor, adapter_then[key]) for key, tensor in adapter.items())


def test_numbers_that_leave_the_finite_end_their_run_alone(folder):
    names = write_configs(
        folder, "nan", {"b": {"train": {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0}}}
    )
    ended = cli(folder, "train", *names)
    assert ended.code == 5
    assert "nan-b: step" in ended.err and "1 of 3 runs failed: nan-b" in ended.err
    assert_same(folder, "alone", "nan", "ac")


def test_one_that_is_not_finite_does_not_reach_others_through_a_mask(tmp_path):
    write_run(tmp_path, "bloom")
    write_reviews(tmp_path / "others.jsonl", 31)
    short = {"max_steps": 4, "early_stopping_patience": None, "micro_batch_tokens": 1024}  # all runs in one row
    explodes = {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0}
    changes = {name: {"train": short | (explodes if name == "b" else {}), "data": {"eval": None}} for name in RUNS}
    names = write_configs(tmp_path, "nan", changes)
    ended = cli(tmp_path, "train", *names)
    assert ended.code == 5 and "1 of 3 runs failed: nan-b" in ended.err


def test_bf16_is_that_of_a_run_alone(tmp_path):
    write_run(tmp_path)
    write_reviews(tmp_path / "others.jsonl", 31)
    short = {"train": {"max_steps": 3, "early_stopping_patience": None, "eval_steps": 2}}
    losses = {}
    for kind, bf16 in (("alone", True), ("together", True), ("exact", False)):
        names = write_configs(tmp_path, kind, dict.fromkeys(RUNS, short | {"trainer": {"bf16": bf16}}))
        for some in [names] if kind == "together" else [[name] for name in names]:
            together(tmp_path, *some)
        losses[kind] = [trained(tmp_path, kind, name)[0] for name in RUNS]
    apart = {
        kind: max(
            abs(x - y) for a, b in zip(losses["alone"], losses[kind], strict=True) for x, y in zip(a, b, strict=True)
        )
        for kind in ("together", "exact")
    }
    assert apart["together"] < 0.1 * apart["exact"], apart


def test_a_base_that_draws_for_itself_is_refused(tmp_path):
    write_run(tmp_path, "opt")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"layerdrop": 0.5}))
    write_reviews(tmp_path / "others.jsonl", 31)
    ended = cli(tmp_path, "train", *write_configs(tmp_path, "drawn"))
    assert ended.code == 2
    assert "can't be trained with several configs at a time: its layers draw random numbers" in ended.err
    assert not list(tmp_path.glob("drawn-?"))  # before any of them began


@pytest.mark.parametrize("command", ["check", "train"])
def test_layers_with_dropout_are_not_computed_again(command, tmp_path):
    write_run(tmp_path, "opt")
    write_reviews(tmp_path / "others.jsonl", 31)
    again = {"train": {"gradient_checkpointing": True}}
    ended = cli(tmp_path, command, *write_configs(tmp_path, "again", dict.fromkeys(RUNS, again)))
    assert ended.code == 2 and "gradient_checkpointing is not supported for several configs" in ended.err


def test_gradients_have_the_same_memory_in_every_step(folder, monkeypatch):
    monkeypatch.chdir(folder)
    runs = Together(Stopper(), 2)
    configs = [load_config(Path(name)) for name in write_configs(folder, "memory")[1:]]
    setups = [RunSetup(config, "cpu", together=runs) for config in configs]
    weights, others = ([*trainable(setup.model).values()] for setup in setups)
    joint = JointModel(runs._base, {n: setup.model for n, setup in enumerate(setups)}, "auto", checkpointing=False)
    isolation, model, plan, places, taken = setups[0].isolation, setups[0].model, setups[0].plan, [], []
    for step in (plan[0], plan[1]):
        joint.add_gradients([RunStep(0, isolation, step["micro"], model, step["total"], plan.shard)], lambda: None)
        places.append([w.grad.data_ptr() for w in weights])
        model.zero_grad()
        taken += [torch.empty_like(w) for w in weights]  # what would be the next gradients' memory
    assert places[0] == places[1]
    assert all(w.grad is None for w in others)  # the optimizer leaves those alone that got none


def test_a_failure_of_one_process_ends_all_runs(monkeypatch):
    def fails():
        raise FilesError("the disk is full")

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    runs = Together(Stopper(), 1)
    with pytest.raises(FilesError, match="a: the disk is full"):  # the other process still has the run
        runs._advance({Run(0, "a", fails): None})


def test_after_a_signal_each_run_has_its_time_to_save(monkeypatch):
    exits: list[int] = []
    monkeypatch.setattr(signals, "EXIT_SECONDS", 0.2)
    monkeypatch.setattr(os, "_exit", exits.append)
    stopped = Run(0, "stopped", lambda: os.kill(os.getpid(), signal.SIGTERM))
    saves = Run(1, "saves", lambda: time.sleep(0.6))
    with Stopper() as stopper:
        Together(stopper, 2)._advance({stopped: None, saves: None})
    assert isinstance(stopped.error, Stopped) and not saves.error and not exits


@pytest.mark.parametrize(
    "errors, raised, words",
    [
        ([None, NumbersError("x"), FilesError("y")], FilesError, "2 of 3 runs failed: 1, 2"),
        ([FilesError("y"), NumbersError("x"), None], FilesError, "2 of 3 runs failed: 0, 1"),
        ([Stopped(2), NumbersError("x"), Stopped(2)], Stopped, "2 of 3 runs stopped"),
        ([NumbersError("x"), MemoryError("z"), None], MemoryError, "z"),
    ],
)
def test_what_ends_a_command_does_not_depend_on_the_order(errors, raised, words):
    runs = [Run(n, str(n), lambda: None) for n in range(len(errors))]
    for run, error in zip(runs, errors, strict=True):
        run.error = error
    with pytest.raises(raised, match=words):
        raise_errors(runs)


def test_none_begins_if_one_cannot(folder):
    names = write_configs(folder, "begin", {"c": {"data": {"train": "missing.jsonl"}}})
    ended = cli(folder, "train", *names)
    assert ended.code == 3 and "begin-c: " in ended.err
    assert not list(folder.glob("begin-?"))


def test_two_processes_train_them_as_one_does(folder):
    names = write_configs(folder, "two")
    command(folder, 2, "train", *names)
    assert_same(folder, "alone", "two", "b")  # the others have dropout, of which each process draws its own


def test_check_shows_what_they_need_together(folder):
    names = write_configs(folder, "checked")
    ended = cli(folder, "check", *names, "--json")
    facts = json.loads(ended.out)
    alone = [facts["configs"][name]["memory"] for name in facts["configs"]]
    assert facts["memory"]["weights"] == alone[0]["weights"]
    assert facts["memory"]["adapter"] == sum(memory["adapter"] for memory in alone)
    assert max(m["total"] for m in alone) < facts["memory"]["total"] < 2 * max(m["total"] for m in alone)
    assert cli(folder, "check", *names, "--time").code == 2
    ended = cli(folder, "check", *names)
    assert "checked-c" in ended.out and "memory that training them together needs" in ended.out
    assert "one by one; together less" in ended.out
    assert cli(folder, "check", names[0], names[0]).err.strip() == "checked-a.yaml: given twice"


def test_what_they_have_in_common_is_made_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    configs = [load_config(Path(name)) for name in write_configs(folder, "setup")]
    together = Together(Stopper(), len(configs))
    setups = [RunSetup(config, "cpu", together=together) for config in configs]
    assert len({id(setup.tokenizer) for setup in setups}) == 1
    assert len({id(setup.packing) for setup in setups}) == 1
    assert len({id(setup.model) for setup in setups}) == len(setups)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter": {"method": "full"}}, "only LoRA can be trained together"),
        ({"model": {"name": "other"}}, 'model.name: "base" in a, "other" in b'),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
        ({"train": {"micro_batch_tokens": 64}}, "train.micro_batch_tokens"),
        ({"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing"),
        ({"trainer": {"bf16": True}}, "trainer.bf16"),
        ({"trainer": {"fsdp": True}}, "trainer.fsdp"),
        ({"train": {"report_to": ["wandb"]}}, "wandb"),
        ({"train": {"report_to": ["tensorboard", "mlflow"]}}, "report_to: mlflow is not supported"),
        ({"output": "out"}, "output out is that of a too"),
    ],
)
def test_what_runs_must_have_in_common_is_named(changes, words):
    base = yaml.safe_load(CONFIG) | {"output": "out"}
    other = {key: base.get(key, {}) | value if isinstance(value, dict) else value for key, value in changes.items()}
    if "adapter" in changes:
        other["adapter"] = changes["adapter"]
    configs = {"a": parse_config(base, (), "a"), "b": parse_config(base | {"output": "two"} | other, (), "b")}
    with pytest.raises(ConfigError) as error:
        check_together(configs)
    assert words in str(error.value)


def rows_of(sizes: list[list[int]], most: int, way: Isolation = Isolation.ATTENTION) -> list[list[tuple[int, int]]]:
    """(run, tokens) in each row of steps with micro-batches of these sizes."""
    micro = [[{"input_ids": torch.zeros(1, size), "keep": torch.zeros(1)} for size in of_run] for of_run in sizes]
    steps = [RunRows(n, way, own) for n, own in enumerate(micro)]  # type: ignore
    return [[(s.run, tokens_of(m)) for s, m in row] for row in rows(steps, most)]


def test_rows_are_few_and_even():
    assert rows_of([[100]] * 6, 384) == [[(0, 100), (1, 100), (2, 100)], [(3, 100), (4, 100), (5, 100)]]
    assert rows_of([[500], [20], [30]], 384) == [[(0, 500)], [(1, 20), (2, 30)]]
    assert rows_of([[50, 60], [10]], 384) == [[(0, 50), (1, 10)], [(0, 60)]]
    assert sorted(map(sorted, rows_of([[120], [121], [180], [179]], 300))) == [
        [(0, 120), (2, 180)],
        [(1, 121), (3, 179)],
    ]
    assert rows_of([], 384) == rows_of([[]], 384) == []


@pytest.mark.parametrize("way", [Isolation.MASK, Isolation.ONE_PER_ROW])
def test_runs_share_no_row_that_would_not_keep_them_apart(way):
    assert rows_of([[50, 60], [10]], 384, way) == [[(0, 50)], [(0, 60)], [(1, 10)]]


def test_a_row_has_a_run_once_and_in_its_order():
    drawn = random.Random(3)
    for _ in range(100):
        sizes = [[drawn.randint(1, 200) for _ in range(drawn.randint(0, 5))] for _ in range(drawn.randint(1, 8))]
        found = rows_of(sizes, most := drawn.randint(50, 600))
        assert all(len(dict(row)) == len(row) and sum(dict(row).values()) <= max(most, 200) for row in found)
        assert [[size for row in found for n, size in row if n == run] for run in range(len(sizes))] == sizes


def test_a_layer_that_is_computed_again_draws_the_same_again():
    torch.manual_seed(3)
    expected = torch.rand(4), torch.rand(4), torch.rand(4)
    torch.manual_seed(3)
    run = RunGenerators()
    torch.manual_seed(9)  # of another run
    others = torch.random.get_rng_state()
    drawn = []
    for what in ("first", "second", "second", "first"):
        with run.drawing(what):
            drawn.append(torch.rand(4))
    assert all(map(torch.equal, drawn, (expected[0], expected[1], expected[1], expected[0])))
    run.start_row()
    with run.drawing("first"):
        assert torch.equal(torch.rand(4), expected[2])
    assert torch.equal(torch.random.get_rng_state(), others)
