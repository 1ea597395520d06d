"""Check that an adapter read from files fits a model: its modules, their shapes, and copies of base weights."""

import difflib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.multi import base_layer, base_modules
from lora_ft.methods.lora.peft import PREFIX, WEIGHTS, AdapterFile, differences
from lora_ft.methods.lora.peft_config import targeted
from lora_ft.methods.lora.token_rows import check_rows
from lora_ft.methods.lora.whole import check_whole
from lora_ft.nn.adapted import dimensions


def check_against(model: nn.Module, adapter: AdapterFile) -> dict[str, nn.Linear | Conv1D]:
    """Check that the adapter fits `model`, which may be on meta. Returns path -> module of all linear modules of the base.

    ModelError if modules are missing or unexpected (with both lists), or a tensor has the wrong shape (with both shapes).
    """
    path = adapter.folder / WEIGHTS
    linear = {name: m for name, m in base_modules(model).items() if isinstance(m, nn.Linear | Conv1D)}
    head = next((n for n, m in linear.items() if m is base_layer(model.get_output_embeddings())), None)
    expected = targeted(adapter.trained.adapter_config, linear, head)
    whole = check_whole(model, adapter)
    check_rows(model, adapter)
    missing = set() if expected is None else expected - adapter.stored.keys() - whole
    unexpected = adapter.stored.keys() - linear.keys()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = adapter.copies.keys() - parameters.keys()
    if missing or unexpected or unknown:
        near = difflib.get_close_matches(min(unexpected), list(linear), n=2, cutoff=0) if unexpected else []
        hint = f" The model has {', '.join(near)}." if near else ""
        raise ModelError(differences(path, missing, unexpected | unknown) + f" Is it another model's adapter?{hint}")
    for module, (A, B) in adapter.stored.items():
        check_ab_shapes(path, module, A, B, *dimensions(linear[module]))
    for name, copy in adapter.copies.items():
        if copy.shape != parameters[name].shape:
            raise _other_weight(path, name)
    return linear


def check_ab_shapes(path: Path, module: str, A: Tensor, B: Tensor, in_features: int, out_features: int) -> None:
    """Check that A is (R, in) and B (out, R); the ModelError names both shapes."""
    for letter, tensor, expected in (("A", A, (A.shape[0], in_features)), ("B", B, (out_features, B.shape[1]))):
        if tuple(tensor.shape) != expected:
            key = f"{PREFIX}{module}.lora_{letter}.weight"
            raise ModelError(f"{path}: {key} has shape {tuple(tensor.shape)}, the model needs {expected}.")


def check_copies(model: nn.Module, adapter: AdapterFile) -> None:
    """Check that the base weights in the adapter's file (PEFT saves those of an adapted head) are the model's.

    A model on the meta device passes: it has no weights to compare.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if any(p.is_meta for p in parameters.values()):
        return
    weights = {}
    for name in adapter.copies:
        module, _, leaf = name.rpartition(".")
        weights[name] = parameters.get(name, parameters.get(f"{module}.base.{leaf}"))  # in a LoRA layer
    check_equal(adapter, weights)


def check_equal(adapter: AdapterFile, weights: Mapping[str, Tensor | None]) -> None:
    """Check the copies against the base's `weights`: equal, or one the other rounded, as by loading in another dtype."""
    for name, copy in adapter.copies.items():
        base = weights[name]
        if base is not None:
            base = base.detach().cpu()
            if torch.equal(base.to(copy.dtype), copy) or torch.equal(copy.to(base.dtype), base):
                continue
        raise _other_weight(adapter.folder / WEIGHTS, name)


def _other_weight(path: Path, name: str) -> ModelError:
    reason = "fully trained or resized modules can't be applied here. Merge the adapter with PEFT."
    return ModelError(f"{path}: has a weight {name} that differs from the base's: {reason}")
