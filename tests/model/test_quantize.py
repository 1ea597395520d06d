"""Loading a quantized base: what comes out, and what is refused."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base
from lora_ft.model.quantize import quantize
from lora_ft.nn.quantized import QuantizedLinear
from tests.helpers.families import tiny_model, token_ids


def layers(model) -> dict[str, QuantizedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def saved(folder, family="llama", dtype=torch.float32):
    tiny_model(family).to(dtype).save_pretrained(folder)
    return resolve(str(folder))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "falcon_new", "mixtral", "phimoe", "gemma3"])
@pytest.mark.parametrize("form, dtype", [("int8", "float32"), ("nf4", "bfloat16")])
def test_one_tensor_at_a_time_gives_what_quantizing_the_whole_model_gives(tmp_path, family, form, dtype):
    base = saved(tmp_path, family)
    model, whole = load_base(base, dtype, quantization=form), quantize(load_base(base, "float32"), form)
    assert layers(model).keys() == layers(whole).keys() != set()
    assert not any("lm_head" in path or "embed" in path or "router" in path for path in layers(model))
    wanted = whole.state_dict()
    for name, tensor in model.state_dict().items():
        own = wanted[name] if "." + name.rpartition(".")[2] in (".scale", ".offset") else wanted[name].to(tensor.dtype)
        assert torch.equal(tensor, own), name
    assert model.dtype == getattr(torch, dtype)
    if dtype == "float32":
        assert torch.equal(model(token_ids(), use_cache=False).logits, whole(token_ids(), use_cache=False).logits)
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")


def damaged(base, change) -> None:
    path = base.folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(K), "weights are missing: model.layers.0.self_attn.k_proj.weight"),
        (lambda t: t.update({K: t[K][:1].clone()}), "another shape"),
        (lambda t: t[K].fill_(float("nan")), "layers.0.self_attn.k_proj.weight hold"),
    ],
)
def test_a_damaged_weight_is_named(tmp_path, change, words):
    base = saved(tmp_path)
    damaged(base, change)
    with pytest.raises(ModelError, match=words):
        load_base(base, quantization="int8")


def test_a_base_that_is_stored_quantized_is_refused(tmp_path):
    base = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"stored quantized already \(bitsandbytes\). Name the model in full precision"
    ):
        load_base(base, quantization="nf4")


def test_without_bitsandbytes_nf4_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-ft\[nf4\]'"):
        load_base(saved(tmp_path), quantization="nf4")
