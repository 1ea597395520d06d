"""The choice of what to merge onto, by the losses on a run's eval data."""

import json
import re

import pytest
import torch

from lora_ft.commands.evaluate import evaluate_command
from lora_ft.commands.merge import merge_command
from lora_ft.config.load import load_config
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.inject import inject_lora, lora_layers
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base, load_tokenizer, tokenizer_hash
from tests.helpers.tiny import save_with_record, write_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's folder with an adapter on an int8 base."""
    monkeypatch.chdir(write_run(tmp_path))
    config, base = load_config("config.yaml", ["model.quantization=int8"]), resolve("base")
    model = load_base(base, quantization="int8")
    inject_lora(model, seed=0)
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            torch.nn.init.normal_(B, std=0.1, generator=torch.Generator().manual_seed(0))
    (tmp_path / "out").mkdir()
    about = {"name": "base", "revision": None, "fingerprint": base.fingerprint, "quantization": "int8"}
    record = {"config": config.model_dump(mode="json"), "tokenizer": tokenizer_hash(load_tokenizer(base))}
    save_with_record(model, tmp_path / "out", "base", base=about, seed=0, **record)
    return tmp_path / "out"


def loss_of(folder, capsys, *overrides) -> dict[str, float]:
    """The losses that `eval` finds, of "base" and "adapter", or of a "model"."""
    capsys.readouterr()
    evaluate_command([folder], as_json=True, overrides=overrides)
    said = capsys.readouterr()
    assert ("was trained on its base int8, and is used on it not quantized" in said.err) == bool(overrides)
    scores = json.loads(said.out)
    return {who: scores[who]["loss"] for who in ("base", "adapter", "model") if who in scores}


def test_the_losses_are_shown_and_the_lower_one_decides(folder, capsys):
    merge_command(folder)
    said = capsys.readouterr()
    base, trained, quantized, original = map(float, re.findall(r" (\d+\.\d{4})\n", said.out))
    chosen = "quantized" if quantized <= original else "original"
    assert f"merged --onto {chosen}, whose loss is lower" in said.err
    as_trained, other = (loss_of(folder, capsys, *how) for how in ([], ["model.quantization=null"]))
    assert (base, trained) == pytest.approx((as_trained["base"], as_trained["adapter"]), abs=1e-4)
    assert (quantized, original) == pytest.approx((as_trained["adapter"], other["adapter"]), abs=1e-4)

    merged = loss_of(folder.parent / "out-merged", capsys)["model"]  # which is not quantized once more
    assert merged == pytest.approx(min(quantized, original), abs=1e-4)


def test_without_the_data_it_is_what_was_trained(folder, capsys):
    (folder.parent / "eval.jsonl").unlink()
    merge_command(folder)
    said = capsys.readouterr()
    assert "no eval data at hand" in said.err and "eval.jsonl" in said.err and "in int8" in said.out


def test_a_form_that_is_not_known_is_refused(folder):
    path = folder / "lora_ft.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"base": record["base"] | {"quantization": "int2"}}))
    with pytest.raises(ModelError, match="quantization 'int2'; this lora-ft knows nf4, int8"):
        merge_command(folder)
