"""Adapters in the plainest of PEFT's format: scaling 1, and one rank if the modules have one. It is exact."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.experts import packed
from lora_ft.methods.lora.peft import AdapterFile
from lora_ft.methods.lora.peft_config import CONFIG, PREFIX, WEIGHTS
from lora_ft.methods.lora.targets import suffixes
from lora_ft.nn.expert_names import PATH, parameter_of

Factors = Mapping[str, tuple[Tensor, Tensor]]  # module -> A (rank, in) and B (out, rank), of the change B A


def plain_tensors(adapter: AdapterFile) -> Factors:
    """Module -> A and s B, whatever patterns or rslora the adapter has. Raises ModelError for what these two can't say."""
    require_plain(adapter)
    return {module: (A, adapter.scalings[module] * B) for module, (A, B) in adapter.tensors.items()}


def require_plain(adapter: AdapterFile) -> None:
    """Raise ModelError for an adapter that is more than A and B: DoRA."""
    if adapter.dora:
        problem = "uses DoRA, which plain A and B can't say, so it can't be combined, compressed or exported."
        raise ModelError(
            f"{adapter.folder}: {problem} Merge it (`lora-ft merge`), or load the folder itself with PEFT."
        )


def padded(tensors: Factors) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """The same with all ranks made the largest, R, by zeros, as every tool reads it; and R."""
    R = max(A.shape[0] for A, _ in tensors.values())
    missing = {module: R - A.shape[0] for module, (A, _) in tensors.items()}
    return {
        module: (F.pad(A, (0, 0, 0, missing[module])).contiguous(), F.pad(B, (0, missing[module])).contiguous())
        for module, (A, B) in tensors.items()
    }, R


def write_plain(folder: Path, tensors: Factors, parts: Iterable[AdapterFile], base_name: str | None) -> int:
    """Write the two files of an adapter into an existing folder. Returns its largest rank, R.

    With lora_alpha = R, and where a rank is lower the same in both patterns, the scaling of a reader is 1. parts: the adapters
    whose modules it has.
    """
    ranks: dict[str, int] = {}  # of a module, or of all experts' parameter
    for module, (A, _) in tensors.items():
        ranks[parameter_of(module)] = max(A.shape[0], ranks.get(parameter_of(module), 0))
    R = max(ranks.values())
    lower = {name: rank for name, rank in ranks.items() if rank < R}
    pairs, parameters = packed(tensors)
    parts = list(parts)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": R,
        "lora_alpha": R,
        **({"rank_pattern": lower, "alpha_pattern": lower} if lower else {}),
        **({"target_parameters": parameters} if parameters else {}),
        "lora_dropout": 0.0,
        "target_modules": sorted({target for part in parts for target in targets(part)}),
        "bias": "none",
        "fan_in_fan_out": all(bool(part.trained.adapter_config.get("fan_in_fan_out")) for part in parts),
        "inference_mode": True,
    }
    named = {
        f"{PREFIX}{module}.lora_{x}.weight": M
        for module, pair in pairs.items()
        for x, M in zip("AB", pair, strict=True)
    }
    storage.write_tensors(folder / WEIGHTS, named)
    storage.write_json(folder / CONFIG, config)
    return R


def targets(adapter: AdapterFile) -> list[str]:
    """target_modules, sorted: the adapter's own list if it alone determines the modules, else the paths of all modules."""
    config = adapter.trained.adapter_config
    modules = sorted(module for module in adapter.tensors if not PATH.fullmatch(module))
    own = config.get("target_modules")
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if not isinstance(own, list) or narrowed:
        return modules
    matches = [set(own) & set(suffixes(module)) for module in modules]
    return sorted(set(own)) if all(matches) and set().union(*matches) == set(own) else modules
