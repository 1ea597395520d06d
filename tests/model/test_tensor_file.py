"""Tensors read without torch are those that torch reads, and a damaged file is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_ft.core.errors import ModelError
from lora_ft.model import tensor_file
from lora_ft.model.tensor_file import read_header, write_in_turn


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


def test_tensors_written_in_turn_are_read_by_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 5).bfloat16(), "none": torch.zeros(0, 4), "b": torch.tensor([True, False])}
    tensors |= {"scalar": torch.tensor(2.5), "indices": torch.arange(7)}
    save_file(tensors, tmp_path / "own.safetensors", {"format": "pt", "by": "us"})
    stored = read_header(tmp_path / "own.safetensors")
    layout = {name: (of.dtype, of.shape, of.end - of.start) for name, of in stored.items()}
    pairs = [(name, tensor.flatten().view(torch.uint8).numpy()) for name, tensor in tensors.items()]
    path = tmp_path / "new.safetensors"
    write_in_turn(path, layout, reversed(pairs), {"format": "pt", "by": "us"})
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "us"} and {*file.keys()} == tensors.keys()
    with pytest.raises(AssertionError):
        write_in_turn(tmp_path / "part.safetensors", layout, pairs[:-1])
    assert {p.name for p in tmp_path.iterdir()} == {"own.safetensors", "new.safetensors"}
