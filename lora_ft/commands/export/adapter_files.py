"""Write an adapter alone as other programs read it: the subset of PEFT's format that all support, and llama.cpp's GGUF.

The subset has one rank, scaling 1 and no patterns, and is exact. The GGUF, for `--lora FILE` with a base's, is like that of
llama.cpp's convert_lora_to_gguf.py.
"""

from pathlib import Path

import gguf
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft.commands.export.gguf_format import Weight, by_number, gguf_name, layout, reordered, write_gguf
from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.core.names import portable_name
from lora_ft.methods.lora.files import CONFIG, WEIGHTS
from lora_ft.methods.lora.peft import PREFIX, AdapterFile
from lora_ft.methods.lora.targets import suffixes


def portable_tensors(adapter: AdapterFile) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Module -> A (R, in) and s B (out, R), float32, zero-padded to the largest rank R; and R.

    With lora_alpha = R the scaling of a reader is 1, whatever patterns or rslora the adapter has.
    """
    R = max(A.shape[0] for A, _ in adapter.tensors.values())
    padded = {}
    for module, (A, B) in adapter.tensors.items():
        sB, missing = adapter.scalings[module] * B, R - A.shape[0]
        padded[module] = (F.pad(A, (0, 0, 0, missing)).contiguous(), F.pad(sB, (0, missing)).contiguous())
    return padded, R


def write_portable(adapter: AdapterFile, folder: Path) -> int:
    """Write the adapter's two files into an existing folder. Returns the rank."""
    padded, R = portable_tensors(adapter)
    config, tensors = adapter.trained.adapter_config, {}
    for module, (A, B) in padded.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
    new_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": portable_name(config.get("base_model_name_or_path") or "") or None,
        "r": R,
        "lora_alpha": R,
        "lora_dropout": 0.0,
        "target_modules": targets(adapter),
        "bias": "none",
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "inference_mode": True,
    }
    storage.write_tensors(folder / WEIGHTS, tensors)
    storage.write_json(folder / CONFIG, new_config)
    return R


def targets(adapter: AdapterFile) -> list[str]:
    """target_modules, sorted: the adapter's own list if it alone determines the modules, else the paths of all modules."""
    config, modules = adapter.trained.adapter_config, sorted(adapter.tensors)
    own = config.get("target_modules")
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if not isinstance(own, list) or narrowed:
        return modules
    matches = [set(own) & set(suffixes(module)) for module in modules]
    return sorted(set(own)) if all(matches) and set().union(*matches) == set(own) else modules


def write_adapter_gguf(adapter: AdapterFile, model: PreTrainedModel, path: Path, dtype: str, base_name: str) -> int:
    """Write `adapter` of the base `model`, which may be on the meta device, as a GGUF file. Returns its size in bytes.

    A and B of blk.0.attn_q.weight are blk.0.attn_q.weight.lora_a (rank, in) and .lora_b (out, rank); B includes the scaling,
    and adapter.lora.alpha is the rank.

    Raises:
        ModelError: the family is not supported, or the adapter changes a tied head.
    """
    order = layout(model.config)
    padded, R = portable_tensors(adapter)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = []
    for module in sorted(padded, key=by_number):
        if tied and model.get_submodule(module) is model.get_output_embeddings():
            raise ModelError(
                f"{adapter.folder}: adapts the head, which is tied to the embedding; llama.cpp can't load such an adapter. "
                "Export the merged model instead: add --merged."
            )
        name, (A, B) = gguf_name(order, f"{module}.weight"), padded[module]
        B = reordered(order, f"{module}.weight", B)
        weights += [Weight(f"{name}.lora_{x}", tuple(M.shape), M.clone) for x, M in (("a", A), ("b", B))]
    writer = gguf.GGUFWriter(path, order.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(R))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(portable_name(base_name)).name)
    return write_gguf(writer, weights, dtype)
