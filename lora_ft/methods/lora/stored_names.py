"""The names of a model's weights in its files, which differ from those in memory; a tied head is not in the files at all.

transformers renames weights when it loads them (GPT-NeoX's `embed_out.weight` is `lm_head.weight` in memory) and adds or drops
the prefix of the base model (the hub's gpt2 has `h.0...` for `transformer.h.0...`). Its own functions give the names here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.nn.expert_names import PATH, parameter_of


@dataclass(frozen=True)
class Edit:
    """A tensor to write: `target` is `source` with the adapter of `module` merged into it, or what was trained, or a copy.

    index: in a source that holds all experts, the edited one. rows: those of the module's outputs in the source; None: all.
    trained: the name in memory of a tensor that the adapter has in full.
    """

    source: str
    target: str
    module: str | None
    transposed: bool = False  # whether the file has (in, out) instead of (out, in)
    index: int | None = None
    rows: Tensor | None = None
    trained: str | None = None


def stored_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name in memory -> name on disk (one of `keys`), for tensors that are not stored as a part of another."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    stored = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # as in transformers: this name must not be renamed
            name, converted = rename_source_key(key, [], [], prefix, state)
        if name in state and converted is None:
            stored[name] = key
    return stored


def partners(model: PreTrainedModel, name: str) -> list[str]:
    """The names of the weights that this one is tied to, such as the embedding for a tied head."""
    tied = model.all_tied_weights_keys
    return [tied[name]] if name in tied else [target for target, source in tied.items() if source == name]


def source_of(model: PreTrainedModel, stored: dict[str, str], name: str) -> str | None:
    """The name on disk of this weight or of one it is tied to; None if there is neither. stored: see `stored_names`."""
    return next((stored[n] for n in (name, *partners(model, name)) if n in stored), None)


def plan_edits(
    model: PreTrainedModel,
    stored: dict[str, str],
    keys: Iterable[str],
    modules: Iterable[str],
    whole: Iterable[str] = (),
    rows: str | None = None,
) -> tuple[list[Edit], bool]:
    """The tensors to write, and whether this unties the head from the embedding.

    keys: the names in the files. stored: see `stored_names`. modules: that have A and B. whole: names of tensors that were
    trained in full. rows: the embedding with trained rows.
    """
    modules = list(modules)
    of_experts = expert_edits(model, [module for module in modules if PATH.fullmatch(module)])
    edits, copies, unties = of_experts, [], False
    absent = sorted({e.source for e in of_experts} - set(keys))
    adapted = {f"{module}.weight": module for module in modules if not PATH.fullmatch(module)}
    for name in (*adapted, *whole):
        module = adapted.get(name)
        conv = module is not None and isinstance(model.get_submodule(module), Conv1D)
        source, tied_to = source_of(model, stored, name), partners(model, name)
        unties |= bool(tied_to)
        if source is None:
            absent.append(name)
            continue
        target = stored.get(name) or name_on_disk(model, name)
        trained = name if module is None else None
        edits.append(Edit(source, target, module, conv, trained=trained))
        if name in stored:  # if only one of head and embedding is on disk, the other now needs its own tensor
            copies += [Edit(source, name_on_disk(model, p), None) for p in tied_to if p not in stored]
    if rows:  # which a tied head has too, so they stay tied
        name = f"{rows}.weight"
        sources = [stored[n] for n in (name, *partners(model, name)) if n in stored]
        edits += [Edit(source, source, None, trained=name) for source in sources]
        absent += [] if sources else [name]
    if absent:
        problem = "this architecture stores them in another layout, so the adapter can't be merged on disk."
        raise ModelError(f"the base's files have no separate tensor for {listed(absent)}: {problem}")
    return edits + [copy for copy in copies if all(edit.target != copy.target for edit in edits)], unties


def expert_edits(model: PreTrainedModel, modules: Iterable[str]) -> list[Edit]:
    """The edits for experts' layers, whose weights most files store apart, and a model in memory together.

    transformers' reverse of that conversion, applied to the numbers of the outputs, tells which file's tensor has which ones.
    """
    by_parameter: dict[str, list[str]] = {}
    for module in modules:
        by_parameter.setdefault(parameter_of(module), []).append(module)
    edits = []
    for parameter, layers in by_parameter.items():
        shape, transposed = (
            model.get_parameter(parameter).shape,
            model.get_submodule(parameter.rpartition(".")[0]).is_transposed,
        )
        size = shape[2] if transposed else shape[1]
        numbers = torch.arange(shape[0] * size).view(-1, size, 1).expand(-1, -1, 2)
        parts = revert_weight_conversion(model, {parameter: (numbers.mT if transposed else numbers).contiguous()})
        for name, part in parts.items():
            for index, own in enumerate(part) if part.ndim == 3 else [(None, part)]:
                by_row = bool((own == own[:, :1]).all())  # else by column: (in, out)
                outputs = own[:, 0] if by_row else own[0]
                expert, rows = int(outputs[0]) // size, outputs % size
                edits.append(Edit(name, name, layers[expert], not by_row, index, rows))
    return edits


def name_on_disk(model: PreTrainedModel, name: str) -> str:
    """The name with which transformers would save this weight."""
    return next(iter(revert_weight_conversion(model, {name: model.get_parameter(name)})))
