"""benchmarks/latency.py: both models are measured alike, and a comparison gets the results."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import latency
from lora_ft.commands.compare.page import page
from lora_ft.commands.compare.results import VariantResult
from lora_ft.commands.compare.variants import Variant
from lora_ft.commands.train import train
from lora_ft.config.load import load_config
from lora_ft.core.errors import FilesError
from lora_ft.core.storage import read_json, sha256
from tests.helpers.tiny import write_base, write_run


def test_latency_is_measured_on_both_models_alike(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "base")).eval()
    prompt, token = latency.time_generation(model, torch.zeros((1, latency.PROMPT_TOKENS), dtype=torch.long))
    assert prompt > 0 and token > 0
    assert model.config.max_position_embeddings >= latency.PROMPT_TOKENS + latency.NEW_TOKENS
    assert latency.paired(model, model).keys() == {
        *("prompt_ms", "base_prompt_ms", "prompt_ratio", "token_ms", "base_token_ms", "token_ratio")
    }


def test_a_comparison_gets_the_latency_of_its_variants(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_run(tmp_path))
    config = load_config("config.yaml", ["train.max_steps=1"])
    train(config)
    records = {0: read_json(Path("out/lora_ft.json"), FilesError)}
    variant = VariantResult(Variant({"adapter.rank": "4"}, config), records=records).as_dict()
    result = {"config": config.model_dump(mode="json"), "varied": {}, "tuned": {}, "seeds": [0], "base": {}}
    result |= {"metric": ["", "loss"], "tuning_metric": "loss", "tune_steps": None, "variants": [variant]}
    assert "latency" not in page(result)
    Path("compare.json").write_text(json.dumps(result))
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["latency.py", ".", "--json", "latency.json"])
    latency.main()
    measured = json.loads(Path("compare.json").read_text())["variants"][0]["latency"]
    assert {"adapter", "merged"} <= measured.keys()
    assert measured["of"] == sha256(Path("out/adapter_model.safetensors"))
    assert json.loads(Path("latency.json").read_text()) == {"rank=4": measured}
    assert "rank=4, merged" in capsys.readouterr().out and "new token, ms" in Path("compare.html").read_text()
