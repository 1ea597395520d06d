"""PEFT's adapter format, read strictly and without a model (peft 0.21, `LoraConfig` and `get_peft_model_state_dict`).

`adapter_config.json` says rank, alpha and which modules; `adapter_model.safetensors` holds for each module A (r, in)
and B (out, r), for HF's Conv1D too. What can't be applied exactly is refused by name: nothing is guessed or left out.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.core.run_folder import RECORD
from lora_ft.methods.lora.peft_config import CONFIG, by_pattern, check_config
from lora_ft.methods.trained import Trained
from lora_ft.nn.lora import RowBlocks, scaling

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Slices:
    """How a module of ours is cut: parts of one rank each, in the order in which the file stacks them."""

    rank: int
    rows: dict[str, RowBlocks]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: checked, not yet applied to anything.

    tensors: module path -> A (R, in), B (out, R), float32. scalings: module path -> s of s B A. slices: of our own.
    copies: base weights that PEFT saved beside an adapted head or embedding; the base must hold the very same.
    """

    trained: Trained
    tensors: dict[str, tuple[Tensor, Tensor]]
    scalings: dict[str, float]
    slices: dict[str, Slices]
    copies: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        """The folder it was read from."""
        return self.trained.folder


def read_adapter(trained: Trained) -> AdapterFile:
    """Read the adapter of a folder, ours or PEFT's (a checkpoint of ours too), with every check that needs no model.

    Raises:
        ModelError: it is damaged, of another method, has a rank or shape that contradicts the config, or holds NaN or
            inf. The file and the tensor are named.
    """
    folder, config, record = trained.folder, trained.adapter_config, trained.record
    if trained.method == "full":
        raise ModelError(f"{folder}: a fully fine-tuned model, not an adapter.")
    config_path, weights = folder / CONFIG, folder / WEIGHTS
    if not weights.is_file():
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        if pickles:
            raise ModelError(
                f"{folder / pickles[0]}: a pickle, which can run code when read; it was not opened. Save the adapter "
                f"as {WEIGHTS} where it comes from (PEFT does so by default)."
            )
        raise ModelError(f"{weights}: missing. The adapter is incomplete: copy it again.")
    check_config(config_path, config)
    tensors, copies = _pair(weights, storage.read_tensors(weights))
    scalings = {}
    for module, (A, B) in tensors.items():
        rank = by_pattern(config_path, config.get("rank_pattern"), module, config["r"])
        alpha = by_pattern(config_path, config.get("alpha_pattern"), module, config["lora_alpha"])
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise ModelError(
                f"{weights}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, but {CONFIG} says rank {rank}: "
                f"A must be ({rank}, in) and B (out, {rank})."
            )
        scalings[module] = scaling(rank, alpha, config.get("use_rslora") is True)
    for module, pair in tensors.items():
        for letter, tensor in zip("AB", pair, strict=True):
            key = f"{PREFIX}{module}.lora_{letter}.weight"
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ModelError(f"{weights}: {key} is {tensor.dtype}; floats are needed.")
            if tensor.numel() and not all(torch.isfinite(v) for v in torch.aminmax(tensor)):
                raise ModelError(f"{weights}: {key} holds NaN or inf.")
    tensors = {module: (A.float(), B.float()) for module, (A, B) in tensors.items()}
    slices = _read_slices(folder / RECORD, record, tensors, scalings)
    return AdapterFile(trained, tensors, scalings, slices, copies)


def _pair(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Sort the file's tensors into A and B of modules, and plain copies of base weights."""
    found: dict[str, dict[str, Tensor]] = {}
    copies, unexpected = {}, []
    for key in sorted(tensors):
        if match := KEY.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = tensors[key]
        elif ".lora_embedding_" in key:
            raise ModelError(f"{path}: {key}: LoRA on an embedding can't be applied here. Merge it with PEFT.")
        elif ".lora_magnitude_vector" in key:
            raise ModelError(f"{path}: {key}: DoRA can't be applied here. Merge it with PEFT.")
        elif re.search(r"\.lora_[AB]\.bias$", key):
            raise ModelError(f"{path}: {key}: trained biases (lora_bias) can't be applied here. Merge it with PEFT.")
        elif key.startswith(PREFIX) and ".lora_" not in key:
            copies[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensors[key]
        else:
            unexpected.append(key)
    missing = [f"{PREFIX}{m}.lora_{x}.weight" for m, pair in found.items() for x in "AB" if x not in pair]
    if missing or unexpected or not found:
        raise ModelError(differences(path, missing or (["any lora_A and lora_B"] if not found else []), unexpected))
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}, copies


def differences(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """One message with both lists, each cut after ten."""

    def shown(names: Iterable[str]) -> str:
        names = sorted(names)
        return (", ".join(names[:10]) or "none") + (f" and {len(names) - 10} more" if len(names) > 10 else "")

    return f"{path}: tensors missing: {shown(missing)}; unexpected: {shown(unexpected)}."


def _read_slices(path: Path, record: dict, tensors: dict, scalings: dict[str, float]) -> dict[str, Slices]:
    """The record's slices, checked against the tensors; `scalings` gets the record's exact values."""
    entries = record.get("slices")
    if not entries:
        return {}
    if not isinstance(entries, dict) or entries.keys() != tensors.keys():
        listed = set(entries) if isinstance(entries, dict) else set()
        raise ModelError(differences(path, listed - tensors.keys(), tensors.keys() - listed))
    slices = {}
    for module, entry in entries.items():
        A, B = tensors[module]
        try:
            rank, s = entry["rank"], float(entry["scaling"])
            rows = {part: RowBlocks(*map(int, numbers)) for part, numbers in entry["parts"].items()}
            cut = Slices(int(rank), rows)
            fits = all(
                min(r) >= 0 and r.blocks * r.width == B.shape[0] and 0 < r.length <= r.width - r.start
                for r in rows.values()
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ModelError(f"{path}: slices of {module} can't be read ({e!r}).") from e
        if not fits or not rows or cut.rank < 1 or cut.rank * len(rows) > A.shape[0]:
            raise ModelError(f"{path}: slices of {module} don't fit A {tuple(A.shape)} and B {tuple(B.shape)}.")
        if not math.isclose(s, scalings[module], rel_tol=1e-6):
            raise ModelError(f"{path}: {module} has scaling {s} there and {scalings[module]} by {CONFIG}.")
        scalings[module], slices[module] = s, cut
    return slices
