"""Read PEFT's adapter format strictly, without a model (peft 0.21, `LoraConfig` and `get_peft_model_state_dict`).

`adapter_config.json` has rank, alpha and the adapted modules; `adapter_model.safetensors` has A (r, in) and B (out, r) of each
module, also for Hugging Face's Conv1D. What can't be applied exactly is an error: nothing is guessed or ignored.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.core.run_folder import RECORD
from lora_ft.methods.lora.expert_files import unpacked
from lora_ft.methods.lora.peft_config import (
    CONFIG,
    KEY,
    LENGTHS,
    PREFIX,
    ROWS,
    WEIGHTS,
    by_pattern,
    check_config,
    is_saved_whole,
    token_indices,
)
from lora_ft.methods.trained import Trained
from lora_ft.model.stored import is_finite
from lora_ft.nn.expert_names import parameter_of
from lora_ft.nn.lora import RowBlocks
from lora_ft.nn.scaling import scaling

REFUSED = {r"\.lora_embedding_": "LoRA on an embedding", r"\.lora_[AB]\.bias$": "trained biases (lora_bias)"}


@dataclass(frozen=True)
class Parts:
    """The parts of a module that lora-ft trained: their rank, and part -> rows in the order of the stacked A."""

    rank: int
    rows: dict[str, RowBlocks]


class Rows(NamedTuple):
    """The rows of an embedding that were trained: its path, the tokens, and their rows (n, width)."""

    module: str
    ids: list[int]
    tensor: Tensor


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read and checked, not yet applied to a model.

    stored: module path -> A (R, in) and B (out, R) in the file's dtype, whose shapes are known and whose values are not read:
    a file that is not of the model is refused without its gigabytes. stored_lengths: module path -> DoRA's m (out,), in the
    file's dtype too; empty for LoRA.
    """

    trained: Trained
    stored: dict[str, tuple[Tensor, Tensor]]
    scalings: dict[str, float]  # module path -> s of s B A
    parts: dict[str, Parts]  # module path -> its parts; empty for another tool's adapter
    copies: dict[str, Tensor]  # name -> base weight that PEFT saved with an adapted head; must equal the base's
    stored_lengths: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)  # name -> weight of a module that was trained in full
    rows: "Rows | None" = None

    @property
    def folder(self) -> Path:
        """The folder it was read from."""
        return self.trained.folder

    @property
    def dora(self) -> bool:
        """Whether the lengths of rows were trained too."""
        return bool(self.stored_lengths)

    @cached_property
    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`stored` in float32. Raises ModelError for NaN or inf."""
        return {
            module: (self._values(f"{module}.lora_A.weight", A), self._values(f"{module}.lora_B.weight", B))
            for module, (A, B) in self.stored.items()
        }

    @cached_property
    def lengths(self) -> dict[str, Tensor]:
        """`stored_lengths` in float32. Raises ModelError for NaN or inf."""
        return {m: self._values(f"{m}.lora_magnitude_vector", own) for m, own in self.stored_lengths.items()}

    def _values(self, name: str, tensor: Tensor) -> Tensor:
        if not is_finite(tensor):
            raise ModelError(f"{self.folder / WEIGHTS}: {PREFIX}{name} contains NaN or inf.")
        return tensor.float()


def read_adapter(trained: Trained) -> AdapterFile:
    """Read the adapter of a folder, lora-ft's (also a checkpoint) or PEFT's, with all checks that need no model and no values.

    ModelError, with file and tensor, if it is damaged, of another method, or contradicts its config.
    """
    folder, config, record = trained.folder, trained.adapter_config, trained.record
    if trained.method == "full":
        raise ModelError(f"{folder}: a fully fine-tuned model, not an adapter.")
    config_path, weights = folder / CONFIG, folder / WEIGHTS
    if not weights.is_file():
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        if pickles:
            problem = f"{folder / pickles[0]}: a pickle, which can run code when loaded; it was not opened."
            way_out = f"Save the adapter as {WEIGHTS} with the tool that made it (PEFT does so by default)."
            raise ModelError(f"{problem} {way_out}")
        raise ModelError(f"{weights}: missing. The adapter is incomplete: copy it again.")
    check_config(config_path, config)
    stored, lengths, copies = _sort(weights, storage.read_tensors(weights))
    _check_lengths(weights, config.get("use_dora") is True, stored, lengths)
    saved = config.get("modules_to_save")
    whole = {name: copies.pop(name) for name in [*copies] if is_saved_whole(name.rpartition(".")[0], saved)}

    def rank_of(parameter: str) -> int:
        return by_pattern(config_path, config.get("rank_pattern"), parameter, config["r"])

    stored = unpacked(weights, stored, config.get("target_parameters") or [], rank_of)
    scalings = {}
    for module, (A, B) in stored.items():
        rank = rank_of(parameter_of(module))
        alpha = by_pattern(config_path, config.get("alpha_pattern"), parameter_of(module), config["lora_alpha"])
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise ModelError(
                f"{weights}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, but {CONFIG} says rank {rank}: "
                f"A must be ({rank}, in) and B (out, {rank})."
            )
        scalings[module] = scaling(rank, alpha, config.get("use_rslora") is True)
    parts = _read_parts(folder / RECORD, record, stored, scalings)
    ids = token_indices(config_path, config.get("trainable_token_indices"))
    rows = _token_rows(weights, ids, copies)
    return AdapterFile(trained, stored, scalings, parts, copies, lengths, whole, rows)


def _token_rows(path: Path, ids: list[int], copies: dict[str, Tensor]) -> Rows | None:
    """The trained rows of an embedding, taken out of `copies`. Raises ModelError unless the file has those of one."""
    found = {name: copies.pop(name) for name in [*copies] if name.endswith(ROWS)}
    if not ids and not found:
        return None
    if len(found) != 1 or not ids:
        has = f"rows of {listed([name.removesuffix(ROWS) for name in found]) or 'no embedding'}, of {len(ids)} tokens"
        raise ModelError(f"{path}: trainable_token_indices: {has}. One embedding's can be applied; merge it with PEFT.")
    name, tensor = found.popitem()
    return Rows(name.removesuffix(ROWS), ids, tensor)


def _sort(
    path: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Sort the file's tensors into A and B by module, DoRA's lengths by module, and copies of base weights by name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    lengths, copies, unexpected = {}, {}, []
    for key, tensor in sorted(tensors.items()):
        match, of_lengths = KEY.fullmatch(key), LENGTHS.fullmatch(key)
        if (match or of_lengths) and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ModelError(f"{path}: {key} is {tensor.dtype}, not a floating-point type.")
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif of_lengths:
            lengths[of_lengths[1]] = tensor
        elif kind := next((words for pattern, words in REFUSED.items() if re.search(pattern, key)), None):
            raise ModelError(f"{path}: {key}: {kind} can't be applied here. Merge it with PEFT.")
        elif key.startswith(PREFIX) and ".lora_" not in key:
            copies[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
        else:
            unexpected.append(key)
    missing = [f"{PREFIX}{m}.lora_{x}.weight" for m, pair in pairs.items() for x in "AB" if x not in pair]
    if missing or unexpected or not pairs:
        raise ModelError(differences(path, missing or (["any lora_A and lora_B"] if not pairs else []), unexpected))
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}, lengths, copies


def _check_lengths(
    path: Path, dora: bool, stored: dict[str, tuple[Tensor, Tensor]], lengths: dict[str, Tensor]
) -> None:
    """Raise ModelError unless each module has a length for each output if the config says DoRA, and none has if not."""
    expected = stored.keys() if dora else set()
    if lengths.keys() != expected:
        absent, extra = (
            [f"{module}.lora_magnitude_vector" for module in modules]
            for modules in (expected - lengths.keys(), lengths.keys() - expected)
        )
        raise ModelError(f"{differences(path, absent, extra)} {CONFIG} says that this is {'' if dora else 'not '}DoRA.")
    for module, own in lengths.items():
        if (shape := tuple(own.shape)) != (rows := stored[module][1].shape[0],):
            raise ModelError(f"{path}: {module}.lora_magnitude_vector has shape {shape}, but B has {rows} rows.")


def differences(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """A message with both lists, at most ten names of each."""
    absent, extra = (listed(sorted(names)) or "none" for names in (missing, unexpected))
    return f"{path}: tensors missing: {absent}; unexpected: {extra}."


def _read_parts(path: Path, record: dict, tensors: dict, scalings: dict[str, float]) -> dict[str, Parts]:
    """The record's `slices`, checked against the tensors. Updates `scalings` with the record's exact values."""
    entries = record.get("slices")
    if not entries:
        return {}
    if not isinstance(entries, dict) or entries.keys() != tensors.keys():
        listed = set(entries) if isinstance(entries, dict) else set()
        raise ModelError(differences(path, listed - tensors.keys(), tensors.keys() - listed))
    parts = {}
    for module, entry in entries.items():
        A, B = tensors[module]
        try:
            rank, s = entry["rank"], float(entry["scaling"])
            rows = {part: RowBlocks(*map(int, numbers)) for part, numbers in entry["parts"].items()}
            parts[module] = Parts(int(rank), rows)
            inside = [min(r) >= 0 and 0 < r.length <= r.width - r.start for r in rows.values()]
            fits = all(inside) and {r.blocks * r.width for r in rows.values()} == {B.shape[0]}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise ModelError(f"{path}: slices of {module} can't be read ({e!r}).") from e
        if not fits or not 1 <= parts[module].rank <= A.shape[0] // len(rows):
            raise ModelError(f"{path}: slices of {module} don't fit A {tuple(A.shape)} and B {tuple(B.shape)}.")
        if not math.isclose(s, scalings[module], rel_tol=1e-6):
            raise ModelError(f"{path}: {module} has scaling {s} here and {scalings[module]} in {CONFIG}.")
        scalings[module] = s
    return parts
