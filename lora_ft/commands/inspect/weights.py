"""Where each module's W is in the files of a base. Imports no torch, but for files with other names than the modules."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_ft.model.files import Base, weight_files
from lora_ft.model.tensor_file import Stored, read_header
from lora_ft.nn.expert_names import PATH, parameter_of


class Weight(NamedTuple):
    """A W. parts: the tensors that have its rows, in their order; several where files have an expert's gate and up apart."""

    parts: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (in, out) as GPT-2's files have it."""
        rows, *width = self.parts[0].shape
        return (rows + sum(part.shape[0] for part in self.parts[1:]), *width)

    @property
    def is_float(self) -> bool:
        """Whether it can be read; a quantized weight can't."""
        return all(part.is_float for part in self.parts)

    def values(self) -> np.ndarray:
        """All values in its shape, float32."""
        return np.concatenate([part.values() for part in self.parts])

    def norm(self) -> float:
        """The Frobenius norm."""
        return math.hypot(*(part.norm() for part in self.parts))


def locate(base: Base, modules: Sequence[str], others: Sequence[str]) -> dict[str, Weight]:
    """Module -> its W in the base's files, of the `modules` and `others` that it has."""
    files = {name: stored for path in weight_files(base) for name, stored in read_header(path).items()}
    names: dict[str, str | None] = {module: f"{module}.weight" for module in (*modules, *others)}
    of_experts: dict[str, Weight] = {}
    if any(names[module] not in files for module in modules):  # they have other names in memory, or the head is tied
        from lora_ft.methods.lora.stored_names import source_of, stored_names
        from lora_ft.model.load import skeleton

        model = skeleton(base)
        stored = stored_names(model, list(files))
        names = {module: source_of(model, stored, f"{module}.weight") for module in names if not PATH.fullmatch(module)}
        of_experts = _experts(model, files, [module for module in (*modules, *others) if PATH.fullmatch(module)])
    return of_experts | {module: Weight((files[name],)) for module, name in names.items() if name in files}


def _experts(model, files: dict[str, Stored], modules: Sequence[str]) -> dict[str, Weight]:
    """The W of experts' layers, which files have apart, or in one tensor for all."""
    from lora_ft.methods.lora.stored_names import expert_edits

    parts: dict[str, list[tuple[int, Stored]]] = {}
    known = dict(model.named_parameters())
    for edit in expert_edits(model, [module for module in modules if parameter_of(module) in known]):
        if edit.source in files:
            stored = files[edit.source]
            part = stored if edit.index is None else stored.part(edit.index)
            first = 0 if edit.rows is None else int(edit.rows[0])
            parts.setdefault(edit.module or "", []).append((first, part))
    return {module: Weight(tuple(part for _, part in sorted(of, key=lambda p: p[0]))) for module, of in parts.items()}
