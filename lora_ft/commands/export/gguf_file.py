"""Write a GGUF file, one tensor at a time."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from lora_ft.core import storage

# dtype -> GGUF's type of a tensor, GGUF's type of a file
KINDS = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


class Weight(NamedTuple):
    """A tensor to write: its name in the file, its shape, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_gguf(
    path: Path,
    architecture: str,
    write_metadata: Callable[[gguf.GGUFWriter], None],
    weights: Sequence[Weight],
    dtype: str,
) -> int:
    """Write `weights`, vectors in float32 and the others in `dtype`, after the metadata. Returns the file's size in bytes.

    Raises:
        FilesError: the disk does not have enough space (checked before anything is written).
    """
    kind, file_type = KINDS[dtype]
    F32 = gguf.GGMLQuantizationType.F32
    kinds = [kind if len(weight.shape) > 1 else F32 for weight in weights]
    sizes = [math.prod(w.shape) * (4 if k is F32 else 2) for w, k in zip(weights, kinds, strict=True)]
    storage.require_space(path.parent, sum(sizes) + 2**24)
    writer = gguf.GGUFWriter(path, architecture)
    try:
        write_metadata(writer)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for weight, stored, size in zip(weights, kinds, sizes, strict=True):
            writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), size, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, stored in zip(weights, kinds, strict=True):
            writer.write_tensor_data(_stored(weight.read(), stored))
    finally:
        writer.close()
    return path.stat().st_size


def _stored(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The tensor in the type of the file, rounded once to nearest."""
    if kind is gguf.GGMLQuantizationType.BF16:  # numpy has no bfloat16
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    dtype = torch.float16 if kind is gguf.GGMLQuantizationType.F16 else torch.float32
    return tensor.to(dtype).contiguous().numpy()
