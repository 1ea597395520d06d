"""Where a model's weights stand in its files: names on disk differ from names in memory, and a tied head isn't there.

transformers renames on load (GPT-NeoX's `embed_out.weight` is `lm_head.weight`), and adds or drops the prefix of the
base model (the hub's gpt2 has `h.0...` for `transformer.h.0...`). Its own rules are asked, on a model without weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from lora_ft.core.errors import ModelError


@dataclass(frozen=True)
class Edit:
    """One tensor to write: `target` is `source` with the adapter of `module` in it, or (module None) a copy of it."""

    source: str
    target: str
    module: str | None
    transposed: bool = False


def stored_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name in memory -> name on disk, for the tensors that are stored as they are (not as parts of another)."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # as transformers does: it should not have been renamed
            name, converted = rename_source_key(key, [], [], prefix, state)
        if name in state and converted is None:
            found[name] = key
    return found


def partners(model: PreTrainedModel, name: str) -> list[str]:
    """The weights that this one is tied to (the embedding, for a tied head)."""
    tied = model.all_tied_weights_keys
    return [tied[name]] if name in tied else [target for target, source in tied.items() if source == name]


def source_of(model: PreTrainedModel, stored: dict[str, str], name: str) -> str | None:
    """The tensor on disk that holds this weight, its own or the one it is tied to."""
    return next((stored[n] for n in (name, *partners(model, name)) if n in stored), None)


def plan(model: PreTrainedModel, stored: dict[str, str], modules: Iterable[str]) -> tuple[list[Edit], bool]:
    """The tensors to write for adapters on `modules`, and whether that unties the head from the embedding.

    Raises:
        ModelError: weights of adapted modules that aren't on disk, or not as a tensor of their own (all are named).
    """
    edits, absent, unties = [], [], False
    for module in modules:
        name, conv = f"{module}.weight", isinstance(model.get_submodule(module), Conv1D)
        source, tied_to = source_of(model, stored, name), partners(model, name)
        unties |= bool(tied_to)
        if source is None:
            absent.append(name)
            continue
        edits.append(Edit(source, stored.get(name) or name_on_disk(model, name), module, conv))
        if name in stored:  # maybe under the head's name alone: the embedding then needs a tensor of its own
            edits += [Edit(source, name_on_disk(model, p), None) for p in tied_to if p not in stored]
    if absent:
        raise ModelError(
            f"the base's files hold no tensor of its own for {', '.join(absent[:10])}"
            + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
            + ": this architecture stores them in another layout, so this adapter can't be merged on disk."
        )
    return edits, unties


def name_on_disk(model: PreTrainedModel, name: str) -> str:
    """The name under which transformers would save this weight."""
    return next(iter(revert_weight_conversion(model, {name: model.get_parameter(name)})))
