"""Whether an adapter read from files fits a base: its weights, its tokenizer, its modules and their shapes."""

import difflib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import printable
from lora_ft.methods.lora.multi import bare, bare_modules
from lora_ft.methods.lora.peft import PREFIX, WEIGHTS, AdapterFile, differences
from lora_ft.methods.lora.peft_config import targeted
from lora_ft.model.files import Base, digest, fingerprint, resolve, resolve_of
from lora_ft.model.load import tokenizer_hash
from lora_ft.nn.lora import dimensions


def base_of(folder: Path, record: dict | None, config: dict, name: str | None, allow_pickle: bool = False) -> Base:
    """The files of the base that `name`, or else a trained folder's record or config, names.

    Raises:
        ModelError: neither names one, or it isn't there.
    """
    recorded = (record or {}).get("base") or {}
    name = name or recorded.get("name") or config.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{folder}: doesn't say which base it was trained on. Name it with --base.")
    if name == recorded.get("name"):
        return resolve_of(folder, recorded, allow_pickle)
    return resolve(name, allow_pickle=allow_pickle)


def check_against(model: nn.Module, adapter: AdapterFile) -> dict[str, nn.Linear | Conv1D]:
    """The model's linear modules, after checking that the adapter fits them (a model on the meta device will do).

    Raises:
        ModelError: modules missing or unexpected (both lists), or a tensor of the wrong shape (both shapes).
    """
    path = adapter.folder / WEIGHTS
    linear = {name: m for name, m in bare_modules(model).items() if isinstance(m, nn.Linear | Conv1D)}
    head = next((n for n, m in linear.items() if m is bare(model.get_output_embeddings())), None)
    expected = targeted(adapter.config, linear, head)
    missing = set() if expected is None else expected - adapter.tensors.keys()
    unexpected = adapter.tensors.keys() - linear.keys()
    unknown = adapter.copies.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    if missing or unexpected or unknown:
        near = difflib.get_close_matches(min(unexpected), list(linear), n=2, cutoff=0) if unexpected else []
        hint = f" The model has {', '.join(near)}." if near else ""
        raise ModelError(differences(path, missing, unexpected | unknown) + f" Is it another model's adapter?{hint}")
    for module, (A, B) in adapter.tensors.items():
        check_shape(path, module, A, B, *dimensions(linear[module]))
    return linear


def check_shape(path: Path, module: str, A: Tensor, B: Tensor, in_features: int, out_features: int) -> None:
    for name, found, wanted in (("A", A, (A.shape[0], in_features)), ("B", B, (out_features, B.shape[1]))):
        if tuple(found.shape) != wanted:
            key = f"{PREFIX}{module}.lora_{name}.weight"
            raise ModelError(f"{path}: {key} has shape {tuple(found.shape)}, the model needs {wanted}.")


def check_copies(model: nn.Module, adapter: AdapterFile) -> None:
    """ModelError unless the base weights in the file (PEFT adds those of an adapted head) are the model's own.

    Of a model on the meta device nothing is asked: its weights are yet to come.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if any(p.is_meta for p in parameters.values()):
        return  # a model without weights is asked for shapes only
    for name, copy in adapter.copies.items():
        module = name.rpartition(".")[0]
        key = name if name in parameters else name.replace(module, f"{module}.base", 1)  # adapted already
        if key not in parameters or not same_weight(parameters[key].detach(), copy):
            raise ModelError(changed_copy(adapter, name))


def same_weight(base: Tensor, copy: Tensor) -> bool:
    """Whether one is the other, maybe rounded to its dtype: a base can be loaded in another dtype than stored."""
    base = base.cpu()
    if base.shape != copy.shape:
        return False
    return torch.equal(base.to(copy.dtype), copy) or torch.equal(copy.to(base.dtype), base)


def changed_copy(adapter: AdapterFile, name: str) -> str:
    return (
        f"{adapter.folder / WEIGHTS}: holds a weight {name} of its own, which isn't the base's: fully trained or "
        "resized modules can't be applied here. Merge it with PEFT."
    )


def check_base(record: dict | None, base: Base, other_base: bool) -> None:
    """Refuse a base that isn't the one the adapter was trained on, unless `other_base` insists (and then say so).

    Raises:
        ModelError: both fingerprints.
    """
    trained_on = ((record or {}).get("base") or {}).get("fingerprint")
    if trained_on is None:
        print(
            f"note: the adapter records no fingerprint: that {base.name} is its base is taken on trust.",
            file=sys.stderr,
        )
        return
    if trained_on == (found := fingerprint(base)):
        return
    message = f"base {base.name}: not the weights the adapter was trained on (fingerprint {found[:12]}, was {trained_on[:12]})."
    if not other_base:
        raise ModelError(f"{message} Name the right one with --base, or insist with --other-base.")
    print(f"warning: {message} Going on, as --other-base asks.", file=sys.stderr)


def check_tokenizer(record: dict | None, base: Base, tokenizer: PreTrainedTokenizerBase, other_base: bool) -> None:
    """Refuse a tokenizer that turns text into other ids than the one of the training.

    Raises:
        ModelError: it changed.
    """
    template = (record or {}).get("chat_template")
    if template and template != digest(tokenizer.chat_template):
        print(f"warning: base {base.name}: its chat template changed since the training.", file=sys.stderr)
    trained_with = (record or {}).get("tokenizer")
    if trained_with is None or trained_with == tokenizer_hash(tokenizer):
        return
    message = f"base {base.name}: its tokenizer (vocabulary, merges or special tokens) changed since the training."
    if not other_base:
        raise ModelError(f"{message} Restore it, or insist with --other-base.")
    print(f"warning: {message} Going on, as --other-base asks.", file=sys.stderr)


def check_trained_on(name: str, record: dict, base: Base, tokenizer: PreTrainedTokenizerBase, other_base: bool) -> None:
    """`check_base` and `check_tokenizer` for one of several adapters, whose name the message then has."""
    try:
        check_base(record, base, other_base)
        check_tokenizer(record, base, tokenizer, other_base)
    except ModelError as e:
        raise ModelError(f"adapter {printable(name)}: {e}") from e
