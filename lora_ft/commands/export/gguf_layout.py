"""How llama.cpp names a model's weights (gguf's own tables) and in which order it wants their rows."""

import re
from typing import NamedTuple

import gguf
from torch import Tensor
from transformers import PretrainedConfig

from lora_ft.core.errors import ModelError

# transformers' model_type -> (llama.cpp's architecture, whether it wants the rows of q and k interleaved)
FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
ROTATED = re.compile(r"\.self_attn\.(q|k)_proj\.(weight|bias)$")
OTHERWISE = (
    "Merge it (`lora-ft export FOLDER --to merged`) and try llama.cpp's own convert_hf_to_gguf.py on the result."
)


class Layout(NamedTuple):
    """One model's names and orders. architecture: llama.cpp's. heads, kv_heads: of attention. interleaved: see `reordered`."""

    architecture: str
    heads: int
    kv_heads: int
    interleaved: bool
    names: gguf.TensorNameMap


def layout(config: PretrainedConfig) -> Layout:
    """The layout of a model with this config.

    Raises:
        ModelError: a family whose names and orders aren't known here, or a variant of one that llama.cpp computes otherwise.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ModelError(f"GGUF: not for the architecture {family!r}; known are {', '.join(FAMILIES)}. {OTHERWISE}")
    rope = config.rope_parameters or {}
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "linear", "llama3") or part != 1.0:
        raise ModelError(
            f"GGUF: rotary embeddings of the kind {kind!r}, rotating {part:g}, aren't known here. {OTHERWISE}"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"GGUF: the activation {config.hidden_act!r} isn't llama.cpp's of {family}. {OTHERWISE}")
    architecture, interleaved = FAMILIES[family]
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    return Layout(architecture, config.num_attention_heads, config.num_key_value_heads, interleaved, names)


def gguf_name(layout: Layout, name: str) -> str:
    """llama.cpp's name of a weight: blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
    found = layout.names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(
            f"GGUF: llama.cpp has no name for {name} in the architecture {layout.architecture}. {OTHERWISE}"
        )
    return found


def reordered(layout: Layout, name: str, tensor: Tensor) -> Tensor:
    """A weight (rows, in), a bias (rows) or the B of an adapter (rows, rank), its rows as llama.cpp wants them.

    transformers rotates the dimensions i and i + d/2 of a head of size d as a pair; llama.cpp's llama architecture 2i and
    2i + 1. So the rows of q and k are interleaved head by head: row 2i + j there is row i + j d/2 here.
    """
    match = ROTATED.search(name)
    if not layout.interleaved or not match:
        return tensor
    heads = layout.heads if match[1] == "q" else layout.kv_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
