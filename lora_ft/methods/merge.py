"""`lora-ft merge` for every method: LoRA (lora_ft.adapter.merge) and biases fold into the base; the others say why not."""

from pathlib import Path

import torch
from torch import Tensor

from lora_ft import storage
from lora_ft.adapter import merge as lora
from lora_ft.adapter.disk import source_of, stored_names
from lora_ft.adapter.files import WEIGHTS, write_record
from lora_ft.adapter.fit import base_of, check_base, check_tokenizer
from lora_ft.adapter.peft import verified_record
from lora_ft.adapter.shards import finite, stored_keys
from lora_ft.base import INDEX, Base, fingerprint, opened, weight_files
from lora_ft.errors import ModelError
from lora_ft.methods.files import method_of, read
from lora_ft.model import skeleton

WHY_NOT = {
    "full": "a whole model already, which loads anywhere as it is: nothing is left to fold.",
    "bottleneck": "adapter layers can't be folded: between their two matrices is a nonlinearity, so no single matrix does "
    "what they do. Use them with `lora-ft eval`.",
    "prompt": "virtual tokens can't be folded: they are an input, and change no weights. PEFT loads the folder as it is.",
}


def merge_command(
    adapter: Path,
    *,
    base: str | None = None,
    output: Path | None = None,
    verify: bool = True,
    other_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Fold what was trained into its base, and print what was made.

    Raises:
        UserError: it can't be folded, and why; or as `merge_adapter` and `merge_biases`.
    """
    method = method_of(adapter)
    if method in WHY_NOT:
        raise ModelError(f"{adapter}: {WHY_NOT[method]}")
    if method == "lora":
        lora.merge_command(
            adapter, base=base, output=output, verify=verify, other_base=other_base,
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
        )  # fmt: skip
        return
    files = base_of(adapter, verified_record(adapter), read(adapter)[0], base, allow_pickle)
    output = output or lora.beside(adapter, "-merged")
    count = merge_biases(files, adapter, output, other_base=other_base, trust_remote_code=trust_remote_code)
    print(f"merged {adapter} into {files.name}: {output}")
    print(f"  {count} bias vectors replaced; every other tensor is the base's own, to the bit")


def merge_biases(
    base: Base, adapter: Path, output: Path, *, other_base: bool = False, trust_remote_code: bool = False
) -> int:
    """Write the base with the trained biases in the place of its own, shard by shard; how many.

    They are rounded once to the base's dtype. Nothing else is computed, so there is no sum to prove.

    Raises:
        ModelError: the biases aren't those of this base, or its files hold some in another layout.
        FilesError: `output` exists, or the disk is full.
    """
    record, biases = verified_record(adapter) or {}, read(adapter)[1]
    check_base(record, base, other_base)
    tokenizer = lora.tokenizer_of(base, trust_remote_code)
    if tokenizer is not None:
        check_tokenizer(record, base, tokenizer, other_base)
    if base.gguf or base.pickles:
        raise ModelError(
            f"model {base.name}: biases fold into safetensors only. Save the base as a folder of those first."
        )
    model, shards = skeleton(base, trust_remote_code), weight_files(base)
    stored = stored_names(model, stored_keys(shards))
    found = {source_of(model, stored, name): bias for name, bias in biases.items()}
    if None in found or len(found) < len(biases):
        raise ModelError(f"{adapter / WEIGHTS}: the base's files have not each of these biases as a tensor of its own.")
    with storage.staged_folder(output) as staged:
        storage.require_space(output.parent, sum(path.stat().st_size for path in shards) + 2**26)
        for shard in shards:
            tensors: dict[str, Tensor] = {}
            with opened(shard) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    tensors[name] = replaced(finite(file, name, shard), found.pop(name, None), adapter / WEIGHTS, name)
                storage.write_tensors(staged / shard.name, tensors, file.metadata())
        if (base.folder / INDEX).is_file():
            storage.write_json(staged / INDEX, storage.read_json(base.folder / INDEX, ModelError))
        lora.copy_files(base, staged, False, trust_remote_code)
        about = {
            "format": 1,
            "kind": "merged",
            **{
                key: record[key]
                for key in ("config", "tokenizer", "data", "seed", "trainable_parameters")
                if key in record
            },
            "base": {"name": base.name, "revision": base.revision, "fingerprint": fingerprint(base)},
            "other_base": other_base,
            "adapter": {"name": adapter.resolve().name, "sha256": storage.sha256(adapter / WEIGHTS)},
        }
        write_record(staged, about, [p.name for p in staged.iterdir() if p.is_file()])
    return len(biases)


def replaced(own: Tensor, bias: Tensor | None, path: Path, name: str) -> Tensor:
    """`bias` in the dtype of the base's own tensor; that one where there is none."""
    if bias is None:
        return own
    if bias.shape != own.shape:
        raise ModelError(f"{path}: {name} has shape {tuple(bias.shape)}, the base's {tuple(own.shape)}.")
    rounded = bias.to(own.dtype)
    if not torch.isfinite(rounded).all():
        raise ModelError(f"{path}: {name} is too large for {own.dtype}. Merge into a float32 base.")
    return rounded
