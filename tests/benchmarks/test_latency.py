"""benchmarks/latency.py: both models are measured alike, and a comparison gets the results."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import latency
from tests.helpers.tiny import lora_ft, write_base, write_run


def test_latency_is_measured_on_both_models_alike(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "base")).eval()
    prompt, token = latency.time_generation(model, torch.zeros((1, latency.PROMPT_TOKENS), dtype=torch.long))
    assert prompt > 0 and token > 0
    assert model.config.max_position_embeddings >= latency.PROMPT_TOKENS + latency.NEW_TOKENS
    assert latency.paired(model, model).keys() == {
        *("prompt_ms", "base_prompt_ms", "prompt_ratio", "token_ms", "base_token_ms", "token_ratio")
    }


def test_a_comparison_gets_the_latency_of_its_variants_and_keeps_it(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path)
    words = ["compare", "config.yaml", "--vary", "adapter.method=lora,prompt", "--set", "train.max_steps=1"]
    done = lora_ft(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    output = folder / "out-compare"
    assert "latency" not in (output / "compare.html").read_text()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["latency.py", "out-compare", "--json", "latency.json"])
    latency.main()
    lora, prompt = json.loads((output / "compare.json").read_text())["variants"]
    assert {"adapter", "merged"} <= lora["latency"].keys() and "merged" not in prompt["latency"]
    assert json.loads(Path("latency.json").read_text()) == {"lora": lora["latency"], "prompt": prompt["latency"]}
    assert "lora, merged" in capsys.readouterr().out and "new token, ms" in (output / "compare.html").read_text()
    again = lora_ft(*words, "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads((output / "compare.json").read_text())
    assert [v["latency"] for v in json.loads(again.stdout)["variants"]] == [lora["latency"], prompt["latency"]]
