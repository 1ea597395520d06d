"""`train.learning_rate: auto`, tuning by halves, and `--until`."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_ft.config.learning_rate import best_rate, rates_to_try, trial_config, usual_rate
from lora_ft.config.load import load_config, parse_config
from lora_ft.config.tuning import better_half, keep_score, kept_scores
from lora_ft.core.errors import ConfigError, FilesError
from lora_ft.training.lock import locked
from tests.helpers.command import Ended, cli
from tests.helpers.tiny import CONFIG, write_reviews, write_run


def config_with(**sections) -> dict:
    config = yaml.safe_load(CONFIG)
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values if isinstance(values, dict) else values
    return config


def write_auto(folder: Path, name: str = "auto", **sections) -> str:
    """A config with learning_rate auto on 96 rows, whose run takes 48 steps; its path."""
    write_reviews(folder / "train.jsonl", 96)
    train = {"learning_rate": "auto", "batch_size": 4} | sections.pop("train", {})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config_with(train=train, output=name, **sections)))
    return f"{name}.yaml"


def train(folder: Path, *words: str, code: int = 0) -> Ended:
    ended = cli(folder, "train", *words)
    assert ended.code == code, ended.err
    return ended


def record_of(folder: Path) -> dict:
    return json.loads((folder / "lora_ft.json").read_text())


# ---- the rates ----


@pytest.mark.parametrize(
    "adapter, width, rate",
    [
        ({"alpha": 32.0}, 2000, 5e-4),
        ({"alpha": 32.0, "rank": 64}, 2000, 5e-4),
        ({"alpha": 8.0}, 2000, 1e-3),
        ({"alpha": 8.0, "rank": 16, "rslora": True}, 2000, 5e-4),
        ({"alpha": 32.0}, 8000, 1.7e-4),
        ({"method": "full"}, 2000, 5e-5),
        ({"method": "prompt"}, 2000, 5e-3),
    ],
)
def test_the_usual_rate(adapter, width, rate):
    config = config_with()
    config["adapter"] = adapter
    assert usual_rate(parse_config(config), width) == pytest.approx(rate, rel=0.01)


def test_the_rates_to_try_are_around_that_of_a_run_of_a_fifth_of_the_steps():
    rates = rates_to_try(parse_config(config_with(adapter={"alpha": 32.0})), 2000)
    assert rates == [1.3e-4, 3.3e-4, 8.4e-4, 2.1e-3, 5.2e-3]
    assert best_rate({rate: 1 + (i - 2) ** 2 for i, rate in enumerate(rates)}) == pytest.approx(5e-4, rel=0.03)


@pytest.mark.parametrize(
    "losses, least, most",
    [
        ([3.0, 2.0, 1.0, 2.0, 3.0], 1e-2, 1e-2),
        ([3.0, 2.0, 1.0, 1.2, 1.8], 1.1e-2, 2.2e-2),  # between the two best
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1.6e-3, 1.6e-3),  # at an end: the end
        ([5.0, 4.0, 3.0, 2.0, 1.0], 6.25e-2, 6.25e-2),
        ([2.0, 1.5, 1.0, None, None], 1e-2, 1e-2),
        ([2.0, 1.1, 1.0, 1e30, 1e6], 5e-3, 9e-3),  # what exploded is left out, as what failed
        ([2.0, 1.0, None, None, None], 4e-3, 4e-3),  # two are a line
        ([None, None, 0.0, None, 1.0], 1e-2, 1e-2),
        ([0.309, 0.197, 0.256, 0.279, 0.36], 5e-3, 1e-2),  # SST-2: one loss that was good by chance does not decide
        ([2.705, 2.287, 1.9, 1.781, 2.135], 1.8e-2, 2.5e-2),  # E2E, steeper above: a parabola is least at 1.7e-2
    ],
)
def test_the_best_rate_is_where_the_cubic_near_the_losses_is_least(losses, least, most):
    rates = [1.6e-3, 4e-3, 1e-2, 2.5e-2, 6.25e-2]
    chosen = best_rate(dict(zip(rates, losses, strict=True)))
    assert 0.97 * least <= chosen * 5**0.32 <= 1.03 * most
    assert chosen == float(f"{chosen:.1e}")


@settings(max_examples=50)
@given(st.floats(-4, -1), st.floats(0.1, 10), st.floats(0.5, 5))
def test_of_losses_on_a_parabola_the_best_rate_is_its_minimum(minimum, curvature, least):
    rates = [10**minimum * 2.5**n for n in (-1.7, -0.7, 0.3, 1.3, 2.3)]
    losses = {rate: least + curvature * (math.log10(rate) - minimum) ** 2 for rate in rates}
    assert best_rate(losses) == pytest.approx(10**minimum / 5**0.32, rel=0.06)  # two digits


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast", "true", "[1e-3]"])
def test_a_rate_that_is_none_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.learning_rate.*auto"):
        load_config(write_run(tmp_path) / "config.yaml", [f"train.learning_rate={value}"])


# ---- halving ----


@pytest.mark.parametrize(
    "scores, metric, better",
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, "loss", ["b", "c"]),
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, "accuracy", ["d", "a"]),
        ({"a": 3.0, "b": 1.0, "c": 2.0}, "loss", ["b"]),
        ({"a": None, "b": 1.0, "c": None, "d": 4.0}, "loss", ["b", "d"]),
        ({"a": 1.0, "b": 1.0}, "loss", ["a"]),
        ({"a": None, "b": None}, "loss", []),
    ],
)
def test_the_better_half(scores, metric, better):
    assert better_half({key: score and (score, 0.0) for key, score in scores.items()}, metric) == better


def test_the_last_two_are_kept_and_the_loss_decides_between_equals():
    scores = {"a": (0.5, 2.0), "b": (0.5, 1.0), "c": (0.4, 0.1)}
    assert better_half(scores, "accuracy", least=2) == ["b", "a"]


def test_scores_are_kept_with_their_settings(tmp_path):
    config = parse_config(config_with(output=str(tmp_path / "run")))
    keep_score(config, 0.125, (0.8, 1.5))
    keep_score(config, 0.25, None)
    assert kept_scores(config) == {0.125: (0.8, 1.5), 0.25: None}
    with pytest.raises(ConfigError, match=r"other settings:\n  adapter\.rank: was 4, is 2"):
        kept_scores(parse_config(config_with(adapter={"rank": 2}, output=config.output)))
    (tmp_path / "run/tuning.json").write_text('{"config": [], "scores": {"a": 1}}')
    with pytest.raises(FilesError, match="damaged"):
        kept_scores(config)


# ---- --until ----


@pytest.mark.parametrize("together", [False, True])
def test_a_run_that_stops_at_a_step_is_resumed_as_if_it_had_not(together, tmp_path):
    write_run(tmp_path)
    train(tmp_path, "config.yaml")
    names = ["paused"] + ["other"] * together
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(CONFIG + f"output: {name}\n")
    files = [f"{name}.yaml" for name in names]
    for until, step in (("5", 5), ("0.7", 9), ("9", 9)):
        said = train(tmp_path, *files, "--resume", "--until", until).err
        assert ("Continue with --resume" if until != "9" else "already at step 9 of 12") in said
        assert sorted(tmp_path.glob("paused/checkpoints/*"))[-1].name == f"step-{step}"
        assert not (tmp_path / "paused/lora_ft.json").exists()
    train(tmp_path, *files, "--resume")
    alone, paused = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "paused"))
    assert all((alone[key] - paused[key]).abs().max() <= 1e-6 * together for key in alone)
    losses = [
        [(line["step"], line.get("loss")) for line in map(json.loads, (tmp_path / name / "log.jsonl").open())]
        for name in ("out", "paused")
    ]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]


@pytest.mark.parametrize("until", ["0", "-1", "1.5", "nan"])
def test_a_step_that_is_none_is_refused(until, tmp_path):
    assert "--until" in train(write_run(tmp_path), "config.yaml", "--until", until, code=2).err


# ---- auto ----


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("auto"))
    assert "--resume" not in train(folder, write_auto(folder)).err
    return folder


def test_a_rate_is_chosen_on_rows_held_out_of_train(chosen):
    record, page = record_of(chosen / "auto"), (chosen / "auto/report.html").read_text()
    tried, rate = record["learning_rate"]["tried"], record["config"]["train"]["learning_rate"]
    assert len(tried) == 5 and {t["part"] for t in tried} == {1 / 5}
    assert rate == best_rate({t["learning_rate"]: t["loss"] for t in tried})
    for t in tried:
        folder = chosen / f"auto/learning_rate/{t['learning_rate']:g}"
        trial = json.loads((folder / "tuning.json").read_text())
        assert trial["config"]["data"]["eval"] == {"tuning": 0.08} and trial["scores"]["1.0"][0] == t["loss"]
        steps = [line for line in map(json.loads, (folder / "log.jsonl").open()) if "learning_rate" in line]
        assert (
            steps[-1]["step"] in (8, 9) and steps[-1]["learning_rate"] < 0.2 * t["learning_rate"]
        )  # the whole schedule
        assert "A trial of a learning rate" in (folder / "report.html").read_text()
        assert f'<th scope="row">{t["learning_rate"]:g}</th><td>{t["loss"]:.4f}</td><td>1/5</td>' in page
    assert f'<th scope="row">{rate:g} (chosen)</th>' in page
    assert not list(chosen.glob("auto/learning_rate/*/checkpoints/step-*"))
    assert not list(chosen.glob("auto/learning_rate/*/*.safetensors"))


def test_the_run_is_the_one_with_that_rate(chosen):
    record = record_of(chosen / "auto")
    rate = record["config"]["train"]["learning_rate"]
    train(chosen, "auto.yaml", "--set", f"train.learning_rate={rate}", "--set", "output=given")
    assert record["metrics"] == record_of(chosen / "given")["metrics"]


def test_the_same_seed_chooses_the_same(chosen):
    train(chosen, "auto.yaml", "--set", "output=again")
    assert record_of(chosen / "again")["learning_rate"] == record_of(chosen / "auto")["learning_rate"]


def test_a_finished_run_is_not_tuned_again(chosen):
    (chosen / "train.jsonl").rename(chosen / "moved.jsonl")
    ended = train(chosen, "auto.yaml", "--resume")
    (chosen / "moved.jsonl").rename(chosen / "train.jsonl")
    assert "already finished" in ended.err and "trying" not in ended.err
    assert "already contains a run" in train(chosen, "auto.yaml", code=6).err


def test_a_longer_run_keeps_its_rate(chosen):
    shutil.copytree(chosen / "auto", chosen / "longer")
    train(chosen, "auto.yaml", "--resume", "--set", "output=longer", "--set", "train.num_train_epochs=3")
    one, other = (record_of(chosen / name)["config"]["train"]["learning_rate"] for name in ("auto", "longer"))
    assert one == other


def test_a_run_with_a_given_rate_is_not_resumed_with_auto(chosen):
    given = config_with(train={"max_steps": 3}, output="fixed")
    (chosen / "fixed.yaml").write_text(yaml.safe_dump(given))
    train(chosen, "fixed.yaml")
    ended = train(chosen, "fixed.yaml", "--resume", "--set", "train.learning_rate=auto", code=2)
    assert "was given 0.03" in ended.err and "--overwrite" in ended.err


def test_a_stopped_command_goes_on_where_it_was(chosen):
    for rate in record_of(chosen / "auto")["learning_rate"]["tried"][:2]:  # as if killed after two scores
        source = chosen / f"auto/learning_rate/{rate['learning_rate']:g}"
        shutil.copytree(source, chosen / "stopped/learning_rate" / source.name)
        scores = json.loads((source / "tuning.json").read_text())
        scores["config"]["output"] = scores["config"]["output"].replace("auto", "stopped", 1)
        path = chosen / "stopped/learning_rate" / source.name / "tuning.json"
        path.write_text(json.dumps(scores))
    train(chosen, "auto.yaml", "--resume", "--set", "output=stopped")
    assert record_of(chosen / "stopped")["learning_rate"] == record_of(chosen / "auto")["learning_rate"]


def stop_while_trials_are_scored(monkeypatch):
    """Let a signal come with the first evaluation."""
    sent = []

    def stopped(self, check, *args, **kwargs):
        if not sent:  # a second signal would end the process at once
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        check()

    monkeypatch.setattr("lora_ft.evaluation.evaluate.Evaluator.__call__", stopped)


def test_no_other_command_uses_the_output_during_the_trials(chosen, monkeypatch):
    def use(*args, **kwargs):
        with locked(chosen / "locked"):
            pass

    monkeypatch.setattr("lora_ft.commands.learning_rate.run_trials", use)
    ended = train(chosen, "auto.yaml", "--set", "output=locked", code=6)
    assert "in use by another run" in ended.err and not (chosen / "locked").exists()


def test_trials_stopped_while_they_are_scored_are_scored_when_resumed(chosen, monkeypatch):
    with monkeypatch.context() as patch:
        stop_while_trials_are_scored(patch)
        ended = train(chosen, "auto.yaml", "--set", "output=scored", code=128 + signal.SIGTERM)
        assert "Continue with: lora-ft train auto.yaml --set output=scored --resume" in ended.err
    train(chosen, "auto.yaml", "--resume", "--set", "output=scored")
    assert record_of(chosen / "scored")["learning_rate"] == record_of(chosen / "auto")["learning_rate"]


def test_a_stopped_choice_that_replaces_a_run_is_resumed(chosen, monkeypatch):
    shutil.copytree(chosen / "auto", chosen / "begun")
    change = ("--set", "output=begun", "--set", "train.seed=1")
    with monkeypatch.context() as patch:
        stop_while_trials_are_scored(patch)
        train(chosen, "auto.yaml", "--overwrite", *change, code=128 + signal.SIGTERM)
    assert not (chosen / "begun/lora_ft.json").exists()
    train(chosen, "auto.yaml", "--resume", *change)
    assert record_of(chosen / "begun")["config"]["train"]["seed"] == 1


def test_scores_of_a_stopped_command_count_only_when_it_is_resumed(chosen):
    for path in chosen.glob("auto/learning_rate/*/tuning.json"):
        scores = json.loads(path.read_text())
        scores["config"]["output"] = scores["config"]["output"].replace("auto", "anew", 1)
        scores["scores"]["1.0"] = [9.0, 9.0]  # on other data, say
        (chosen / "anew/learning_rate" / path.parent.name).mkdir(parents=True)
        (chosen / "anew/learning_rate" / path.parent.name / "tuning.json").write_text(json.dumps(scores))
    train(chosen, "auto.yaml", "--set", "output=anew")
    assert record_of(chosen / "anew")["learning_rate"] == record_of(chosen / "auto")["learning_rate"]


def test_what_is_held_out_for_evaluation_is_in_no_trial(chosen):
    train(chosen, "auto.yaml", "--set", "data.eval=0.25", "--set", "output=held")
    lines = [json.loads(line) for path in chosen.glob("held/learning_rate/*/log.jsonl") for line in path.open()]
    scored = [line for line in lines if "eval_tuning_loss" in line]
    assert len(scored) == 5 and not any(key.startswith("eval_eval") for line in lines for key in line)
    assert "loss" in record_of(chosen / "held")["metrics"]


def test_no_rate_is_tried_if_another_run_cannot_begin(chosen):
    config = yaml.safe_load((chosen / "auto.yaml").read_text()) | {"output": "never"}
    for name, rate, data in (("never", "auto", "train.jsonl"), ("missing", 1e-3, "missing.jsonl")):
        own = {"train": {"learning_rate": rate}, "data": config["data"] | {"train": data}, "output": name}
        (chosen / f"{name}.yaml").write_text(yaml.safe_dump(config | own))
    ended = train(chosen, "never.yaml", "missing.yaml", code=3)
    assert "missing: " in ended.err and "trying" not in ended.err and not (chosen / "never").exists()


def test_overwriting_tries_again(chosen):
    shutil.copytree(chosen / "auto", chosen / "replaced")
    train(chosen, "auto.yaml", "--overwrite", "--set", "output=replaced", "--set", "train.seed=1")
    tried, before = (record_of(chosen / name)["learning_rate"]["tried"] for name in ("replaced", "auto"))
    assert [t["loss"] for t in tried] != [t["loss"] for t in before]


def test_other_methods_try_rates_one_by_one(chosen):
    config = yaml.safe_load((chosen / "auto.yaml").read_text()) | {"adapter": {"method": "full"}, "output": "full"}
    (chosen / "full.yaml").write_text(yaml.safe_dump(config))
    train(chosen, "full.yaml", "--set", "train.max_steps=32")
    assert len(record_of(chosen / "full")["learning_rate"]["tried"]) == 5
    assert not list(chosen.glob("full/learning_rate/*/checkpoints/step-*"))


def test_a_short_run_takes_the_usual_rate(chosen):
    ended = train(chosen, "auto.yaml", "--set", "train.max_steps=25", "--set", "output=short")
    assert "too few steps to try" in ended.err and record_of(chosen / "short")["learning_rate"] == {"tried": []}
    train(chosen, "auto.yaml", "--resume", "--set", "train.max_steps=25", "--set", "output=short")
    write_reviews(chosen / "one.jsonl", 1)
    one_row = ("data.train=one.jsonl", "train.max_steps=40", "output=one")
    ended = train(chosen, "auto.yaml", *(word for setting in one_row for word in ("--set", setting)))
    assert "too few rows to try" in ended.err


@pytest.mark.parametrize("setting, of_trial", [(100, 20), (3, 1), (0.5, 0.5), (0, 0)])
def test_the_schedule_of_a_trial_is_the_runs_in_a_fifth_of_the_steps(setting, of_trial):
    config = config_with(
        train={"warmup_steps": setting, "max_steps": 500, "lr_scheduler_type": "warmup_stable_decay"},
        trainer={"lr_scheduler_kwargs": {"num_decay_steps": 200, "num_cycles": 2}},
    )
    trial = trial_config(parse_config(config), 1e-3)
    assert (trial.train.max_steps, trial.train.warmup_steps) == (100, of_trial)
    assert trial.trainer.lr_scheduler_kwargs == {"num_decay_steps": 40, "num_cycles": 2}


@pytest.mark.parametrize(
    "train, data, share, most",
    [
        ({"num_train_epochs": 3.0}, {}, 0.08, 500),
        ({"num_train_epochs": 0.5}, {}, 0.04, 500),
        ({"num_train_epochs": 2.0}, {"max_train_examples": 500}, 0.08, 80),
        ({"num_train_epochs": 1.0}, {"max_train_examples": 3}, 0.08, 1),
        ({"max_steps": 100, "batch_size": 8}, {}, 0.08, 64),
        ({"max_steps": 10**6}, {"max_eval_examples": 50}, 0.08, 50),
    ],
)
def test_a_trial_is_scored_on_a_small_part_of_the_runs_examples(train, data, share, most):
    base = config_with()
    trial = trial_config(parse_config(base | {"train": base["train"] | train, "data": base["data"] | data}), 1e-3)
    assert trial.data.eval["tuning"] == pytest.approx(share) and trial.data.max_eval_examples == most


def test_rates_that_overflow_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ft.config.learning_rate.FACTORS", (1, 1e30, 2e30))
    folder = write_run(tmp_path)
    train(folder, write_auto(folder))
    record = record_of(folder / "auto")
    assert [t["loss"] is None for t in record["learning_rate"]["tried"]] == [False, True, True]


def test_several_configs_choose_each_its_own(chosen):
    config = yaml.safe_load((chosen / "auto.yaml").read_text())
    (chosen / "fixed2.yaml").write_text(yaml.safe_dump(config | {"train": {"max_steps": 4}, "output": "fixed2"}))
    ended = train(chosen, "auto.yaml", "fixed2.yaml", "--overwrite")
    assert "auto: learning rate: trying " in ended.err and "\nauto: 0.0067: step 9 of 9" in ended.err
    assert record_of(chosen / "auto")["learning_rate"] and "learning_rate" not in record_of(chosen / "fixed2")


def test_check_accepts_it(chosen):
    ended = cli(chosen, "check", "auto.yaml", "--set", "output=new")
    assert ended.code == 0, ended.err
    assert "learning_rate" in ended.out and "auto" in ended.out
