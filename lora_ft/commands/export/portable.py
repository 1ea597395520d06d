"""The part of PEFT's format that every runtime reads: one rank, nothing to scale, no extras. The same function, exactly."""

from pathlib import Path

import torch
from torch import Tensor

from lora_ft.core import storage
from lora_ft.methods.lora.files import CONFIG, WEIGHTS, portable_name, suffixes
from lora_ft.methods.lora.peft import PREFIX, AdapterFile


def portable_tensors(adapter: AdapterFile) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Module -> A (R, in) and s B (out, R), float32, zero-padded to the largest rank R; and R.

    With lora_alpha = R a reader's own scaling is 1, with or without rank and alpha patterns and rslora.
    """
    R = max(A.shape[0] for A, _ in adapter.tensors.values())
    folded = {}
    for module, (A, B) in adapter.tensors.items():
        padding = (0, R - A.shape[0])
        sB = adapter.scalings[module] * B
        folded[module] = (
            torch.nn.functional.pad(A, (0, 0, *padding)).contiguous(),
            torch.nn.functional.pad(sB, padding).contiguous(),
        )
    return folded, R


def write_portable(adapter: AdapterFile, folder: Path) -> int:
    """Write the adapter's two files into an existing folder. Returns the rank."""
    folded, R = portable_tensors(adapter)
    tensors = {}
    for module, (A, B) in folded.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": portable_name(adapter.trained.adapter_config.get("base_model_name_or_path") or "")
        or None,
        "r": R,
        "lora_alpha": R,
        "lora_dropout": 0.0,
        "target_modules": targets(adapter),
        "bias": "none",
        "fan_in_fan_out": bool(adapter.trained.adapter_config.get("fan_in_fan_out")),
        "inference_mode": True,
    }
    storage.write_tensors(folder / WEIGHTS, tensors)
    storage.write_json(folder / CONFIG, config)
    return R


def targets(adapter: AdapterFile) -> list[str]:
    """target_modules, sorted: the adapter's own list where it says it all, else each module by its path."""
    config, modules = adapter.trained.adapter_config, sorted(adapter.tensors)
    own = config.get("target_modules")
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if not isinstance(own, list) or narrowed:
        return modules
    meant = [set(own) & set(suffixes(module)) for module in modules]
    return sorted(set(own)) if all(meant) and set().union(*meant) == set(own) else modules
