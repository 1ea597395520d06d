"""The tensors of a base's own files: their names, shapes and dtypes, read one at a time."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_ft.core.errors import ModelError, is_out_of_memory
from lora_ft.core.messages import first_line
from lora_ft.model.files import Base, opened, weight_files

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}  # of safetensors


@contextmanager
def stored_weights(base: Base, device: str = "cpu", *, one_by_one: bool = False) -> Iterator[dict[str, Any]]:
    """All tensors of the base's own files by name, none of them read yet: slices of safetensors, or a pickle's tensors.

    device: of a pickle's tensors; meta if only shapes and dtypes are needed. one_by_one: what is read of a safetensors file
    stays in memory with its tensor, not as long as any other of the file. Raises ModelError as `weight_files`.
    """
    with ExitStack() as stack:
        weights: dict[str, Any] = {}
        for path in base.pickles:
            weights |= _unpickled(path, device)
        for path in () if base.pickles else weight_files(base):
            file = stack.enter_context(opened(path))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
            weights |= {n: Reopened(path, n, s) for n, s in slices.items()} if one_by_one else slices
        yield weights


class Reopened:
    """A tensor of a safetensors file, which is opened for each reading, as a slice of it. The system counts what was read of an
    open file as this process's memory."""

    def __init__(self, path: Path, name: str, stored: Any):
        self.path, self.name, self.shape, self.dtype = path, name, stored.get_shape(), stored.get_dtype()

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        with opened(self.path) as file:
            return file.get_slice(self.name)[index]


def shape_and_dtype(weight: Any) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Of a value of `stored_weights`; the dtype is None if it is not a floating-point type of 16 bits or more."""
    if isinstance(weight, torch.Tensor):
        return tuple(weight.shape), weight.dtype if weight.dtype in FLOATS.values() else None
    return tuple(weight.get_shape()), FLOATS.get(weight.get_dtype())


def stored_dtype(base: Base) -> torch.dtype:
    """The dtype of the largest floating-point tensor on disk (float32 for a GGUF, which is dequantized)."""
    if base.gguf:
        return torch.float32
    with stored_weights(base, "meta") as weights:
        sizes = [(math.prod(shape), dtype) for shape, dtype in map(shape_and_dtype, weights.values()) if dtype]
    largest = max(sizes, key=lambda size: size[0], default=(0, torch.float32))[1]
    return torch.float32 if largest is torch.float64 else largest


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any floating-point type contains neither NaN nor inf."""
    values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # aminmax has no float8
    return not values.numel() or all(torch.isfinite(v) for v in torch.aminmax(values))


def _unpickled(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, read by the loader that runs no code."""
    try:
        content = dict(torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path)))
    except Exception as e:
        if is_out_of_memory(e):
            raise
        why = f"torch's weights_only loader refuses it, so it is damaged or unsafe ({first_line(e)})"
        raise ModelError(f"{path}: {why}.") from e  # a damaged zip, an unknown opcode, a class outside torch
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
