"""Write the base's safetensors files with the adapter merged into them, W' = W + s B A, one tensor at a time."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.compatibility import check_equal
from lora_ft.methods.lora.onto import Onto
from lora_ft.methods.lora.peft import AdapterFile
from lora_ft.methods.lora.stored_names import Edit, source_of
from lora_ft.methods.lora.token_rows import rows_value
from lora_ft.methods.lora.verify import matrix_error, random_signs
from lora_ft.methods.lora.whole import trained_value
from lora_ft.model.files import INDEX, opened
from lora_ft.model.new_tokens import NewRows
from lora_ft.model.stored import is_finite
from lora_ft.model.tensor_file import read_header, write_in_turn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_MAPPED = 2**28  # bytes of a file that are read before it is opened again
BLOCK = 2**20  # weights that are merged and verified at a time: 8 MB in float64, a few copies


def stored_keys(shards: list[Path]) -> list[str]:
    """The names of all tensors in the files."""
    keys: list[str] = []
    for shard in shards:
        with opened(shard) as file:
            keys += file.keys()
    return keys


def stored_tensors(shards: list[Path], names: set[str]) -> dict[str, Tensor]:
    """The tensors in the files that have one of `names`; memory-mapped, not read."""
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        with opened(shard) as file:
            tensors |= {name: file.get_tensor(name) for name in names.intersection(file.keys())}
    return tensors


def check_stored_copies(
    model: PreTrainedModel, adapter: AdapterFile, shards: list[Path], stored: dict[str, str]
) -> None:
    """`check_copies` against the base's files."""
    sources = {name: source_of(model, stored, name) or "" for name in adapter.copies}  # "": in none of the files
    tensors = stored_tensors(shards, set(sources.values()))
    check_equal(adapter, {name: tensors.get(source) for name, source in sources.items()})


@dataclass
class Written:
    """errors: module -> largest error of its products (see `matrix_error`). dtypes: module -> stored dtype, of those that were
    only quantized too. shards: name of a tensor -> its file. added: bytes and numbers that the base does not have.
    """

    errors: dict[str, float] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=lambda: {"total_size": 0, "total_parameters": 0})


@dataclass(frozen=True)
class Merge:
    """What becomes of the base's tensors: the edits by their source, what they are merged onto, and the rows of new tokens."""

    adapter: AdapterFile
    edits: Mapping[str, list[Edit]]
    onto: Onto
    new: NewRows

    @classmethod
    def of(cls, adapter: AdapterFile, edits: Iterable[Edit], onto: Onto, new: NewRows) -> "Merge":
        """edits: in any order."""
        by_source: dict[str, list[Edit]] = {}
        for edit in edits:
            by_source.setdefault(edit.source, []).append(edit)
        return cls(adapter, by_source, onto, new)

    def targets(self, name: str) -> list[str]:
        """The names of the tensors that are written for one of the base's."""
        targets = [edit.target for edit in self.edits.get(name, [])]
        return list(dict.fromkeys(targets if name in targets else [name, *targets]))

    def tensors(self, name: str, stored: Tensor, shard: Path, written: Written) -> dict[str, Tensor]:
        """The tensors that are written for one of the base's, of which `written` is told."""
        W = self.new.added(name, stored)
        D = self.onto.weight(name, W)
        if D is not W:
            written.dtypes[self.onto.layers[name][0]] = W.dtype
        tensors: dict[str, Tensor] = {}
        for edit in self.edits.get(name, []):
            if edit.trained:
                tensors[edit.target] = rounded(W, edit.trained, self.adapter, shard)
                written.dtypes[edit.trained.rpartition(".")[0]] = W.dtype
            elif edit.module is None:
                tensors[edit.target] = W
            else:
                part = ... if edit.index is None else edit.index
                target = tensors.setdefault(edit.target, torch.empty_like(W))
                target[part], error = merged(D[part], edit, self.adapter, shard, W.dtype)
                written.errors[edit.module] = max(error, written.errors.get(edit.module, 0.0))
                written.dtypes[edit.module] = W.dtype
        tensors = {target: tensors[target] if target in tensors else D.to(W.dtype) for target in self.targets(name)}
        all_of_it = sum(tensor.nbytes for tensor in tensors.values()), sum(t.numel() for t in tensors.values())
        written.added["total_size"] += all_of_it[0] - stored.nbytes
        written.added["total_parameters"] += all_of_it[1] - stored.numel()
        return tensors


def write_shards(shards: list[Path], staged: Path, merge: Merge, progress: bool) -> Written:
    """Write each shard with its edited tensors, one tensor at a time, and the index if there is one."""
    written, total = Written(), len(stored_keys(shards))
    with tqdm(total=total, desc="merge", unit="tensor", delay=2, disable=not progress, file=sys.stderr) as bar:
        for shard in shards:
            layout: dict[str, tuple[str, list[int], int]] = {}
            for name, stored in read_header(shard).items():
                shape = merge.new.shape(name, stored.shape)
                size = (stored.end - stored.start) // max(math.prod(stored.shape), 1) * math.prod(shape)
                layout |= dict.fromkeys(merge.targets(name), (stored.dtype, shape, size))
            with opened(shard) as file:
                metadata = file.metadata()
            tensors = ((name, as_bytes(W)) for name, W in merged_tensors(shard, merge, written, bar))
            write_in_turn(staged / shard.name, layout, tensors, metadata)
            written.shards |= dict.fromkeys(layout, shard.name)
    index = shards[0].parent / INDEX
    if index.is_file():
        content = storage.read_json(index, ModelError)
        meta = content.get("metadata") or {}
        meta |= {key: meta[key] + more for key, more in written.added.items() if key in meta}
        storage.write_json(staged / INDEX, content | {"weight_map": dict(sorted(written.shards.items()))})
    return written


def merged_tensors(shard: Path, merge: Merge, written: Written, bar: tqdm) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor to write for those of a file.

    The file is opened again and again: the system counts what was read of an open one as this process's memory.
    """
    names = stored_keys([shard])
    while names:
        read = 0
        with opened(shard) as file:
            while names and read < MOST_MAPPED:
                W = finite(file, names[0], shard)
                yield from merge.tensors(names.pop(0), W, shard, written).items()
                read += W.nbytes
                bar.update()
        del W


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, which NumPy can't have in bfloat16."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def merged(
    W: Tensor, edit: Edit, adapter: AdapterFile, shard: Path, dtype: torch.dtype | None = None
) -> tuple[Tensor, float]:
    """W + s B A in the layout of W and in `dtype` (its own by default), verified on random signs, and the largest error found.

    With DoRA it is m (W + s B A) / |W + s B A|. W, the weight to merge onto: (out, in), or (in, out) if `edit.transposed`.
    """
    dtype = dtype or W.dtype
    if dtype not in DTYPES:
        raise ModelError(f"{shard}: {edit.source} is {dtype}: an adapter can't be merged into quantized weights.")
    assert edit.module is not None
    (A, B), s = adapter.tensors[edit.module], adapter.scalings[edit.module]
    B = B if edit.rows is None else B[edit.rows]
    result = torch.empty_like(W, dtype=dtype)
    old, new = (W.T, result.T) if edit.transposed else (W, result)
    if old.shape != (B.shape[0], A.shape[1]):
        BA = (B.shape[0], A.shape[1])
        raise ModelError(f"{shard}: {edit.source} has shape {tuple(W.shape)}; the adapter's B A {BA}.")
    x, rows, worst = random_signs(A.shape[1]), max(1, BLOCK // A.shape[1]), 0.0
    for i in range(0, B.shape[0], rows):
        part = slice(i, i + rows)
        adapted = torch.addmm(old[part].float(), B[part], A, alpha=s)
        gain = torch.ones(len(adapted), 1)
        if adapter.dora:
            gain = _gain(adapter, edit.module, part, adapted.norm(dim=1))[:, None]
            adapted *= gain
        new[part] = adapted
        if not is_finite(new[part]):
            raise ModelError(f"{shard}: {edit.source} + adapter is too large for {dtype}. Merge into a float32 base.")
        error, quotient = matrix_error(gain.double() * old[part], new[part], A, gain.double() * B[part], s, x)
        if quotient > 1:
            raise ModelError(
                f"the merge failed its verification: {edit.module} on random x is off by {error:.3g} in the rows from {i}, "
                f"{quotient:.3g} times what rounding to {dtype} allows. The output was not kept."
            )
        worst = max(worst, error)
    return result, worst


def _gain(adapter: AdapterFile, module: str, part: slice, norms: Tensor) -> Tensor:
    """DoRA's m / |W + s B A| of some rows; 1 for rows outside the module's parts."""
    adapted = torch.ones(len(adapter.lengths[module]), dtype=torch.bool)
    if parts := adapter.parts.get(module):
        adapted[:] = False
        for rows in parts.rows.values():
            rows.of(adapted).fill_(True)
    return torch.where(adapted[part], adapter.lengths[module][part] / norms, 1.0)


def rounded(W: Tensor, name: str, adapter: AdapterFile, shard: Path) -> Tensor:
    """A tensor that was trained in full, or W with the rows that were trained, in the dtype of W, which it replaces."""
    if adapter.rows and name == f"{adapter.rows.module}.weight":
        result = W.index_copy(0, torch.tensor(adapter.rows.ids), rows_value(adapter).to(W.dtype))
    else:
        result = trained_value(adapter, name).to(W.dtype)
    if W.dtype not in DTYPES or result.shape != W.shape:
        was, now = f"{W.dtype} {tuple(W.shape)}", f"the adapter's {name} {tuple(result.shape)}"
        raise ModelError(f"{shard}: {now} can't replace {was}.")
    if not is_finite(result):
        raise ModelError(f"{shard}: the adapter's {name} is too large for {W.dtype}. Merge into a float32 base.")
    return result.contiguous()


def finite(file: safe_open, name: str, shard: Path) -> Tensor:
    """A tensor of an open file. Raises ModelError if it contains NaN or inf."""
    tensor = file.get_tensor(name)
    if tensor.dtype in DTYPES and not is_finite(tensor):
        raise ModelError(f"{shard}: {name} contains NaN or inf. Copy the base again.")
    return tensor
