"""A run that trains modules in full, through the commands."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_ft.commands.check.command import check
from lora_ft.commands.generate.command import generate_command
from lora_ft.commands.merge import merge_command
from lora_ft.config.load import load_config
from lora_ft.config.together import check_together
from lora_ft.core.errors import ConfigError, ModelError
from tests.helpers.tiny import CONFIG, write_run
from tests.methods.test_runs import SETTINGS, evaluated, run, weights
from tests.training.test_resume import log, until_done

ADAPTER = "rank: 4, alpha: 8, train_modules: [lm_head, ln_f]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("whole"), "gpt2", CONFIG.replace("rank: 4, alpha: 8", ADAPTER))
    run(folder)
    return folder


def test_stopped_again_and_again_it_ends_in_the_same_bits(folder, monkeypatch):
    assert until_done(partial(run, folder, "output=again"), monkeypatch, 17) > 1
    assert log(folder / "again") == log(folder / "out")
    assert weights(folder / "again").read_bytes() == weights(folder / "out").read_bytes()
    last = "checkpoints/step-12/state.safetensors"
    assert (folder / "again" / last).read_bytes() == (folder / "out" / last).read_bytes()


def test_eval_scores_it_beside_its_untouched_base(folder, capsys):
    record = json.loads((folder / "out/lora_ft.json").read_text())
    scores = evaluated(folder, "out", capsys, again=True)
    assert scores["adapter"]["loss"] == pytest.approx(record["metrics"]["loss"], rel=1e-6)
    how = dict(data="eval.jsonl", config_path=folder / "config.yaml", overrides=SETTINGS)
    alone = evaluated(folder, "base", capsys, **how)["model"]
    assert (
        scores["base"]["loss"] == pytest.approx(alone["loss"], rel=1e-6) and scores["adapter"]["loss"] < alone["loss"]
    )


def test_check_counts_what_will_train(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    check(load_config("config.yaml", ["output=new"]), as_json=True)
    facts = json.loads(capsys.readouterr().out)
    record = json.loads(Path("out/lora_ft.json").read_text())
    head = AutoModelForCausalLM.from_pretrained("base").lm_head.weight.numel()
    assert facts["trainable_parameters"] == record["trainable_parameters"] > head
    tensors = load_file("out/adapter_model.safetensors").values()
    assert facts["adapter_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert facts["memory"]["adapter"] == facts["memory"]["optimizer"] == 8 * facts["trainable_parameters"]
    check(load_config("config.yaml", ["output=new"]))
    assert "and in full transformer.ln_f, lm_head" in capsys.readouterr().out


def test_it_answers_and_is_merged(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    generate_command([Path("out")], prompt="good", greedy=True, max_new_tokens=3)
    answer = capsys.readouterr().out
    merge_command(Path("out"))
    said = capsys.readouterr()
    assert "as they were trained in full: lm_head, transformer.ln_f" in said.out and "verified" in said.out
    generate_command([], base="out-merged", prompt="good", greedy=True, max_new_tokens=3)
    assert capsys.readouterr().out == answer
    shutil.rmtree("out-merged")


def test_what_shares_a_base_refuses_it(folder, monkeypatch):
    refused_where_a_base_is_shared(folder, monkeypatch, "modules trained in full", "train_modules")


def refused_where_a_base_is_shared(folder: Path, monkeypatch, what: str, setting: str) -> None:
    """The run in `folder`, which trained `what` by a setting, has no place beside others."""
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match=f"with {what}; only LoRA adapters share a base"):
        generate_command([], adapters=["a=out", "b=out"], prompt="good")
    with pytest.raises(ConfigError, match=f"adapter.{setting} is not supported for several configs"):
        check_together({"a.yaml": load_config("config.yaml"), "b.yaml": load_config("config.yaml", ["output=b"])})
    with pytest.raises(ConfigError, match=f"{setting} trains some of them"):
        load_config("config.yaml", ["trainer.fsdp=true"])
    assert Path("out/lora_ft.json").exists()
