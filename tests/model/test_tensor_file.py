"""Tensors read without torch are those that torch reads, and a damaged file is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_ft.core.errors import ModelError
from lora_ft.model import tensor_file
from lora_ft.model.tensor_file import read_header


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_and_norm(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(tensor_file, "BLOCK", 7)
    tensors = {
        "a": torch.randn(5, 6).to(dtype),
        "b": torch.tensor([float("inf"), -0.0]).to(dtype),
        "c": torch.zeros(0, 3),
    }
    tensors |= {"odd": torch.ones(3, dtype=torch.uint8), "scalar": torch.tensor(2.0).to(dtype)}
    save_file(tensors, tmp_path / "t.safetensors")
    stored = read_header(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        assert stored[name].shape == tuple(tensor.shape) and stored[name].is_float == (name != "odd")
        if name != "odd":
            assert torch.equal(torch.from_numpy(stored[name].values()), tensor.float())
    assert stored["a"].norm() == pytest.approx(tensors["a"].float().norm().item(), rel=1e-6)
    assert len({entry.hash() for entry in stored.values()}) == len(stored)


def header(content: object) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        header(b"{" * 100),
        header([1]),
        header({"a": 1}),
        header({"a": ENTRY}) + b"1234567",
        header({"a": ENTRY | {"shape": [3]}}) + b"12345678",
        header({"a": ENTRY | {"shape": [-2]}}) + b"12345678",
        header({"a": ENTRY | {"data_offsets": [8, 0]}}) + b"12345678",
        header({"a": ENTRY | {"data_offsets": [-4, 4]}}) + b"12345678",
    ],
)
def test_damaged_files(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="t.safetensors: (truncated|damaged)"):
        read_header(path)
    path.write_bytes(header({"a": ENTRY}) + b"12345678")
    assert list(read_header(path)) == ["a"]
