"""The format of llama.cpp's files: the names of weights, the order of their rows, and writing them one at a time."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from lora_ft.core import storage
from lora_ft.core.errors import ModelError

# transformers' model_type -> llama.cpp's architecture, and whether it has the rows of q and k interleaved (`reordered`)
FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
ROTATED = re.compile(r"\.self_attn\.(q|k)_proj\.(weight|bias)$")
ALTERNATIVE = "Merge it (`lora-ft export FOLDER --to merged`) and try llama.cpp's convert_hf_to_gguf.py on the result."
# dtype -> GGUF's type of a tensor, GGUF's type of a file
KINDS = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


class Layout(NamedTuple):
    """The names and row order of a model's weights in llama.cpp."""

    architecture: str  # llama.cpp's name
    heads: int
    kv_heads: int
    interleaved: bool  # the rows of q and k, see `reordered`
    names: gguf.TensorNameMap  # transformers' names -> llama.cpp's


def layout(config: PretrainedConfig) -> Layout:
    """The layout of a model with this config; a ModelError if the family, or this variant of it, is not supported."""
    family = config.model_type
    if family not in FAMILIES:
        raise ModelError(f"GGUF: architecture {family!r} is not supported, only {', '.join(FAMILIES)}. {ALTERNATIVE}")
    rope = config.rope_parameters or {}
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "linear", "llama3") or part != 1.0:
        rotary = f"rotary embeddings of type {kind!r} on {part:.0%} of a head"
        raise ModelError(f"GGUF: {rotary} are not supported. {ALTERNATIVE}")
    if (activation := config.hidden_act) != "silu":
        raise ModelError(f"GGUF: llama.cpp does not support activation {activation!r} in {family}. {ALTERNATIVE}")
    architecture, interleaved = FAMILIES[family]
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    return Layout(architecture, config.num_attention_heads, config.num_key_value_heads, interleaved, names)


def gguf_name(layout: Layout, name: str) -> str:
    """llama.cpp's name of a weight: blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight; else a ModelError."""
    new_name = layout.names.get_name(name, try_suffixes=(".weight", ".bias"))
    if new_name is None:
        raise ModelError(f"GGUF: llama.cpp has no {name} in architecture {layout.architecture}. {ALTERNATIVE}")
    return new_name


def reordered(layout: Layout, name: str, tensor: Tensor) -> Tensor:
    """A weight (out, in), a bias (out,) or an adapter's B (out, rank) with its rows in llama.cpp's order.

    Rotary embeddings rotate pairs of dimensions of a head of size d: i and i + d/2 in transformers, 2i and 2i + 1 in
    llama.cpp's llama architecture. So each head's rows of q and k are interleaved: row i + j d/2 becomes row 2i + j.
    """
    match = ROTATED.search(name)
    if not layout.interleaved or not match:
        return tensor
    heads = layout.heads if match[1] == "q" else layout.kv_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def by_number(name: str) -> list[int | str]:
    """A sort key that puts layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class Weight(NamedTuple):
    """A tensor to write: its name in the file, its shape, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_gguf(writer: gguf.GGUFWriter, weights: Sequence[Weight], dtype: str) -> int:
    """Write the writer's metadata, then `weights`, vectors in float32, the others in `dtype`. Returns the size in bytes.

    Raises:
        FilesError: the disk does not have enough space (checked before anything is written).
        OSError: it can't be written, for `storage.atomic_file` to translate.
    """
    kind, file_type = KINDS[dtype]
    F32 = gguf.GGMLQuantizationType.F32
    kinds = [kind if len(weight.shape) > 1 else F32 for weight in weights]
    sizes = [math.prod(w.shape) * (4 if k is F32 else 2) for w, k in zip(weights, kinds, strict=True)]
    assert writer.path is not None, "every caller has a file to write"
    storage.require_space(writer.path.parent, sum(sizes) + 2**24)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for weight, stored, size in zip(weights, kinds, sizes, strict=True):
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), size, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None, "opened for the header"
        file = writer.fout[0]
        for weight, stored, size in zip(weights, kinds, sizes, strict=True):
            writer.write_padding(file, file.tell())
            file.write(_stored(weight.read(), stored).data)  # the writer uses numpy's tofile, which misses a full disk
            writer.write_padding(file, size)
    finally:
        writer.close()
    return writer.path.stat().st_size


def _stored(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The tensor in the type of the file, rounded once to nearest."""
    if kind is gguf.GGMLQuantizationType.BF16:  # numpy has no bfloat16
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    dtype = torch.float16 if kind is gguf.GGMLQuantizationType.F16 else torch.float32
    return tensor.to(dtype).contiguous().numpy()
