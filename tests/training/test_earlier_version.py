"""What version 0.1.0 wrote before its files were rearranged still loads and resumes (tests/training/earlier_version).

The folder holds a tiny base, a config, the output of a run that ended after 12 steps, and its checkpoint of step 6.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_ft.methods.trained import Trained
from tests.helpers.command import cli

EARLIER = Path(__file__).parent / "earlier_version"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EARLIER, tmp_path / "run")


def losses(log: Path) -> dict[int, float]:
    lines = map(json.loads, log.read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_that_was_killed_resumes_and_ends_where_it_would_have(folder):
    out, expected = folder / "out", load_file(EARLIER / "out/adapter_model.safetensors")
    for name in ("lora_ft.json", "adapter_config.json", "adapter_model.safetensors", "README.md"):
        (out / name).unlink()
    result = cli(folder, "train", "config.yaml", "--resume")
    assert result.code == 0 and "resuming after step 6 of 12" in result.err, result.err
    trained = load_file(out / "adapter_model.safetensors")
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():  # to the bit on the machine that wrote them
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    assert losses(out / "log.jsonl") == pytest.approx(losses(EARLIER / "out/log.jsonl"), abs=1e-5)


def test_a_finished_run_is_recognised(folder):
    result = cli(folder, "train", "config.yaml", "--resume")
    assert result.code == 0 and "already finished" in result.err, result.err


def test_its_adapter_evaluates_and_merges(folder):
    trained = Trained.open(folder / "out")
    assert trained.method == "lora" and trained.config is not None and trained.config.adapter.rank == 4
    result = cli(folder, "eval", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["adapter"]["loss"] == pytest.approx(trained.record["metrics"]["loss"], abs=1e-4)
    assert cli(folder, "merge", "--adapter", "out").code == 0
