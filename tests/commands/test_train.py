"""The main job on a tiny base: train, eval and merge by their commands, each once in a process of its own, else in forks."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_ft.methods.lora.files import load_adapter
from tests.helpers.command import cli, train
from tests.helpers.tiny import RUN_FILES, lora_ft, write_base, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which a run has ended."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    done = lora_ft("train", "config.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out\n"
    return folder


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]


def record(folder) -> dict:
    return json.loads((folder / "out/lora_ft.json").read_text())


def test_what_a_run_leaves(folder):
    names = {p.name for p in (folder / "out").iterdir()}
    assert names == RUN_FILES | {"curves.svg"}
    for checkpoint in (folder / "out/checkpoints").iterdir():
        assert {p.name for p in checkpoint.iterdir()} == {
            "adapter_model.safetensors", "adapter_config.json", "README.md", "lora_ft.json", "state.safetensors", "state.json",
        }  # fmt: skip
    assert str(folder) not in (folder / "out/README.md").read_text() + (folder / "out/adapter_config.json").read_text()


def test_it_learns_and_logs(folder):
    lines = logged(folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    assert [line["step"] for line in evals] == [3, 6, 9, 12]
    assert all({"eval_accuracy", "eval_perplexity", "eval_macro_f1"} <= line.keys() for line in evals)
    assert lines[-1]["epoch"] == 2.0


def test_the_best_adapter_is_kept_with_the_metrics_of_its_step(folder):
    evals = {line["step"]: line for line in logged(folder) if "eval_loss" in line}
    best = min(evals.values(), key=lambda line: line["eval_loss"])
    about = record(folder)
    assert about["step"] == best["step"] and about["metrics"]["loss"] == best["eval_loss"]
    kept = load_file(folder / f"out/checkpoints/step-{best['step']}/adapter_model.safetensors")
    ended = load_file(folder / "out/adapter_model.safetensors")
    assert all(torch.equal(kept[name], ended[name]) for name in kept)


def test_the_record_and_its_manifest(folder):
    about = record(folder)
    assert about["trainable_parameters"] == 2 * 4 * (32 + 48) + 2 * 4 * (32 + 24)  # 2 layers of q and v, rank 4
    assert about["config"]["train"]["batch_size"] == 8 and about["base"]["name"] == "base"
    assert about["data"]["train"]["rows"] == 48
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "log.jsonl"} <= about["files"].keys()


def test_eval_repeats_the_figures_of_training_and_needs_no_argument(folder):
    done = lora_ft("eval", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["examples"] == 20
    assert scores["adapter"]["loss"] == pytest.approx(record(folder)["metrics"]["loss"], rel=1e-5)
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    for who in ("base", "adapter"):
        assert {"loss", "perplexity", "accuracy", "accuracy_ci95", "macro_f1"} <= scores[who].keys()
    table = cli(folder, "eval")
    assert table.code == 0 and "accuracy" in table.out and "positive" in table.out


def test_merge_then_eval_of_the_merged_model_gives_the_adapters_figures(folder):
    done = lora_ft("merge", "--base", "base", "--adapter", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    scores = json.loads(cli(folder, "eval", "--json").out)
    merged = cli(folder, "eval", "out-merged", "--json")
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["model"]["loss"] == pytest.approx(scores["adapter"]["loss"], rel=1e-4)
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    ours = AutoModelForCausalLM.from_pretrained(folder / "base")
    load_adapter(ours, folder / "out")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder / "out-merged")
    with torch.no_grad():
        wanted = ours(ids).logits
        assert torch.allclose(plain(ids).logits, wanted, atol=1e-4)
        assert torch.allclose(peft(ids).logits, wanted, atol=1e-5)


def test_a_checkpoint_is_an_adapter(folder):
    checkpoint = sorted((folder / "out/checkpoints").iterdir())[0]
    done = cli(folder, "eval", str(checkpoint.relative_to(folder)), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["adapter"]["loss"] > 0


def test_a_second_run_needs_leave_and_touches_nothing_of_others(folder):
    (folder / "out/mine.txt").write_text("mine")
    before = (folder / "out/adapter_model.safetensors").read_bytes()
    refused = train(folder)
    assert refused.code == 6 and "--overwrite" in refused.err
    bad = train(folder, "data.train=nothing.jsonl", flags=["--overwrite"])
    assert bad.code == 3
    assert (folder / "out/adapter_model.safetensors").read_bytes() == before
    again = train(folder, flags=["--overwrite"])
    assert again.code == 0, again.err
    assert (folder / "out/adapter_model.safetensors").read_bytes() == before, "the same seed gives the same bytes"
    assert (folder / "out/mine.txt").read_text() == "mine"


def test_check_shows_rows_and_targets_without_training(folder):
    done = cli(folder, "check", "config.yaml", "--json", "--set", "output=other")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["steps"] == 12 and len(facts["targets"]) == 4
    assert facts["trainable_parameters"] == record(folder)["trainable_parameters"]
    assert "»" in cli(folder, "check", "config.yaml").out
    assert not (folder / "other").exists()


def test_eval_with_nothing_trained_says_how_to_get_there(tmp_path):
    done = cli(tmp_path, "eval")
    assert done.code == 4
    assert "lora-ft train CONFIG" in done.err


def test_early_stopping_and_a_held_out_share(tmp_path):
    folder = write_run(tmp_path, "gpt2")
    changes = ("data.eval=0.25", "train.learning_rate=1e-9", "train.eval_steps=1")
    stopping = ("train.early_stopping_patience=2", "train.metric_for_best_model=accuracy")
    done = train(folder, *changes, *stopping)
    assert done.code == 0, done.err
    about = record(folder)
    evals = {line["step"]: line["eval_loss"] for line in logged(folder) if "eval_loss" in line}
    assert about["steps"] == 3  # no accuracy is better than that of the first evaluation
    assert about["step"] == min(
        evals, key=lambda step: (evals[step], -step)
    )  # all tie: the lowest loss, the later step
    assert about["data"]["train"]["used"] == 36 and about["data"]["eval"]["used"] == 12
    assert json.loads(cli(folder, "eval", "--json").out)["examples"] == 12


def test_files_of_others_are_never_written_over(folder, tmp_path):
    run = write_run(tmp_path)
    (run / "out").mkdir()
    (run / "out/README.md").write_text("mine")
    refused = train(run, flags=["--overwrite"])
    assert refused.code == 6 and "README.md" in refused.err
    assert (run / "out/README.md").read_text() == "mine"


def test_an_adapter_begins_only_from_its_own_base(folder, tmp_path):
    run = write_run(tmp_path)
    write_base(run / "base", seed=1)  # the same shapes, other weights
    refused = train(run, f"adapter.init_from={folder / 'out'}")
    assert refused.code == 4 and "fingerprint" in refused.err
    insisted = train(run, f"adapter.init_from={folder / 'out'}", flags=["--other-base"])
    assert insisted.code == 0 and "warning" in insisted.err


def test_a_run_killed_while_its_adapter_landed_counts_as_unfinished(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out/lora_ft.json").unlink()
    for command in (("eval",), ("merge", "--adapter", "out", "--output", "other")):
        refused = cli(tmp_path, *command)
        assert refused.code == 4 and "unfinished" in refused.err and "checkpoints/step-" in refused.err


def test_config_decides_the_base_of_a_foreign_adapter(folder, tmp_path):
    run = write_run(tmp_path)
    shutil.copytree(folder / "out", run / "peft")
    (run / "peft/lora_ft.json").unlink()
    shutil.rmtree(run / "peft/checkpoints")
    text = (run / "peft/adapter_config.json").read_text().replace('"base"', '"some/base"')
    (run / "peft/adapter_config.json").write_text(text)
    done = cli(run, "eval", "peft", "--config", "config.yaml", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["adapter"]["loss"] == pytest.approx(record(folder)["metrics"]["loss"], rel=1e-5)
    assert "has no fingerprint" in done.err


def test_a_reporter_that_is_not_installed_is_a_config_error(tmp_path):
    refused = train(write_run(tmp_path), "train.report_to=[neptune]")
    assert refused.code == 2 and "neptune" in refused.err
