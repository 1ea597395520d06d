"""A model whose blocks stay in its files computes what it computes in memory."""

import pytest
import torch

from lora_ft.model import offload
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base
from lora_ft.nn.quantized import LinearInFile
from tests.helpers.families import tiny_model, token_ids

IDS = token_ids(rows=2, length=9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mixtral", "gpt_oss", "gemma3", "opt"])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_blocks_are_read_as_they_compute(tmp_path, monkeypatch, family, shards):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size=shards)
    base = resolve(str(tmp_path / "base"))
    before = {path.name for path in base.folder.iterdir()}
    expected = load_base(base, "float32")
    with offload.loaded_in_float32(base) as model:
        assert {p.device.type for p in model.parameters()} == {"cpu"}  # small enough
    monkeypatch.setattr(offload, "LARGE", 0)
    with torch.no_grad(), offload.loaded_in_float32(base) as model:
        layers = [m for m in model.modules() if isinstance(m, LinearInFile)]
        assert len(layers) >= 4 and model.num_parameters() < expected.num_parameters()
        torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert {path.name for path in base.folder.iterdir()} == before
