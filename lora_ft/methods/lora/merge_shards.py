"""Write the base's safetensors files with the adapter merged into them, W' = W + s B A, one file at a time."""

import sys
from pathlib import Path

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
from lora_ft.model.stored import is_finite

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


def write_shards(
    shards: list[Path], staged: Path, edits: list[Edit], adapter: AdapterFile, onto: Onto, progress: bool
) -> tuple[dict[str, float], dict[str, torch.dtype]]:
    """Write each shard with its edited tensors, and the index if there is one.

    Returns module -> largest error of its products (see `matrix_error`), and module -> stored dtype, of those that were only
    quantized too.
    """
    by_source: dict[str, list[Edit]] = {}
    for edit in edits:
        by_source.setdefault(edit.source, []).append(edit)
    errors: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {}
    weight_map: dict[str, str] = {}
    added = {"total_size": 0, "total_parameters": 0}  # of the tensors that the base does not have
    total = len(stored_keys(shards))
    with tqdm(total=total, desc="merge", unit="tensor", delay=2, disable=not progress, file=sys.stderr) as bar:
        for shard in shards:
            tensors: dict[str, Tensor] = {}
            with opened(shard) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    W = finite(file, name, shard)
                    edited, D = by_source.get(name, []), onto.weight(name, W)
                    if D is not W:
                        dtypes[onto.layers[name][0]] = W.dtype
                    if not any(e.target == name for e in edited):
                        tensors[name] = D.to(W.dtype).contiguous()  # W is memory-mapped, not copied
                    for e in edited:
                        if e.trained:
                            tensors[e.target] = rounded(W, e.trained, adapter, shard)
                            dtypes[e.trained.rpartition(".")[0]] = W.dtype
                        elif e.module is None:
                            tensors[e.target] = W.clone()
                        else:
                            part = ... if e.index is None else e.index
                            target = tensors.setdefault(e.target, torch.empty_like(W))
                            target[part], error = merged(D[part], e, adapter, shard, W.dtype)
                            errors[e.module], dtypes[e.module] = max(error, errors.get(e.module, 0.0)), W.dtype
                        if e.target != name:
                            added["total_size"] += W.nbytes
                            added["total_parameters"] += W.numel()
                    bar.update()
                storage.write_tensors(staged / shard.name, tensors, file.metadata())
            weight_map |= dict.fromkeys(tensors, shard.name)
    index = shards[0].parent / INDEX
    if index.is_file():
        content = storage.read_json(index, ModelError)
        meta = content.get("metadata") or {}
        meta |= {key: meta[key] + more for key, more in added.items() if key in meta}
        storage.write_json(staged / INDEX, content | {"weight_map": dict(sorted(weight_map.items()))})
    return errors, dtypes


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
