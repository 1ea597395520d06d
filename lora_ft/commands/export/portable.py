"""Write an adapter in the subset of PEFT's format that every library reads: one rank, scaling 1, no patterns. Exact."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from lora_ft.core import storage
from lora_ft.methods.lora.files import CONFIG, WEIGHTS, portable_name
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
