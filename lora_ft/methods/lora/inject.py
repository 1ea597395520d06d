"""Adapt a model with LoRA layers in place; merge and unmerge them.

Injecting is the only place that decides what trains: it freezes the base, and the layers it adds have requires_grad.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods.lora.experts import require_all
from lora_ft.methods.lora.targets import find_targets, unpack_targets
from lora_ft.methods.lora.words import by_module, without
from lora_ft.nn.dora import DoRALinear
from lora_ft.nn.dropout import InputDropout
from lora_ft.nn.expert_names import PATH
from lora_ft.nn.lora import LoRALinear
from lora_ft.nn.pissa import PiSSALinear
from lora_ft.nn.scaling import scaling
from lora_ft.nn.token_rows import TiedHeadRows, TokenRows
from lora_ft.nn.whole import WholeModule

MERGED = (LoRALinear, WholeModule, TokenRows, TiedHeadRows)  # the kinds of layers that a merge replaces
SAME_INPUT = (("q", "k", "v"), ("gate", "up"))  # roles whose modules in a layer have the same input tensor


def inject_lora(
    model: nn.Module,
    targets: Sequence[str] = ("q", "v"),
    rank: int = 8,
    alpha: float = 16.0,
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: str = "kaiming",
    modules: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    exclude: Sequence[str] = (),
    rank_pattern: Mapping[str, int] = MappingProxyType({}),
    alpha_pattern: Mapping[str, float] = MappingProxyType({}),
    seed: int | None = None,
) -> list[str]:
    """Freeze `model` and replace modules by LoRA layers, in place. Returns the paths of the adapted modules.

    B is zero, so the model's outputs do not change.

    Args:
        model: a base on any device, also meta.
        targets, modules, layers: see `find_targets`, also for errors.
        rank: of A (rank, in) and B (out, rank); at least 1.
        alpha: s is alpha / rank, or alpha / sqrt(rank) with `rslora`.
        dora: train the length of each row too (nn/dora.py).
        init: "kaiming", or "pissa" to train the principal part of each weight (nn/pissa.py).
        exclude, rank_pattern, alpha_pattern: what is not adapted, or with another rank or alpha, by words; see `chooses`.
        dropout: the probability of dropping an input of A in training; in [0, 1).
        seed: determines A, whatever the global random state; None draws from it.
    """
    if dora and init == "pissa":
        raise ValueError("DoRA starts from the whole weight, PiSSA from its principal part: choose one")
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"rank {rank} must be at least 1, dropout {dropout} at least 0 and below 1")
    unpack_targets(model, targets, layers)
    adapted = without(find_targets(model, targets, modules, layers), exclude)
    require_all(model, adapted)
    if dora and any(map(PATH.fullmatch, adapted)):
        raise ConfigError("adapter.dora: PEFT's format has no DoRA on experts. Leave it out, or adapt attention alone.")
    ranks = by_module("adapter.rank_pattern", rank_pattern, adapted, rank)
    alphas = by_module("adapter.alpha_pattern", alpha_pattern, adapted, alpha)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    dropouts: dict[tuple, InputDropout] = {}  # one for all layers that have the same input
    for path, rows in adapted.items():
        base = model.get_submodule(path)
        kind = DoRALinear if dora else PiSSALinear if init == "pissa" else LoRALinear
        try:
            layer = kind(base, ranks[path], scaling(ranks[path], alphas[path], rslora), rows)
        except ValueError as e:
            raise ModelError(f"adapter.init: pissa: {path}: {e}. Lower adapter.rank, or leave the module out.") from e
        layer.start(generator)
        if dropout:
            group = path if PATH.fullmatch(path) else next((r for r in SAME_INPUT if set(rows) <= set(r)), path)
            layer.dropout = dropouts.setdefault((path.rpartition(".")[0], group), InputDropout(dropout))
            layer.dropout.readers += 1
        model.set_submodule(path, layer.train(base.training))
    return list(adapted)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> LoRA layer, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter with requires_grad, in model order; for LoRA "path.lora_A.part" and "path.lora_B.part"."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Replace each LoRA layer by a plain one with W + s B A, in place, and what was trained in full by what it has become.

    Returns path -> removed layer, for `unmerge`. A merged head is no longer tied to the embedding, which does not change; the
    config is updated accordingly. With trained rows alone they stay tied.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, MERGED)}
    if not layers:
        reason = "this model is merged already, was never adapted, or its adapters were loaded by name"
        raise ModelError(f"there are no LoRA layers to merge: {reason}; load the one to merge without a name")
    if any(map(PATH.fullmatch, layers)):  # they are layers of their own, which `save_pretrained` would write as such
        raise ModelError("adapted experts can't be merged in memory. Merge the adapter's folder: `lora-ft merge`.")
    if ties_head(model, layers):
        set_tied(model, False)
    for path, layer in layers.items():
        model.set_submodule(path, layer.merged())
    if any(isinstance(layer, TiedHeadRows) for layer in layers.values()):
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return layers


def unmerge(model: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
    """Put back the layers that `merge` removed: the same objects, so outputs are the same to the bit."""
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    if ties_head(model, layers):
        set_tied(model, True)


def ties_head(model: PreTrainedModel, layers: dict[str, nn.Module]) -> bool:
    """Whether one of the layers is a head or the input embedding, the two have one weight, and it gives them two."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    pair = [m for m in layers.values() if m in (head, embedding) and isinstance(m, LoRALinear | WholeModule)]
    return bool(pair) and head is not None and head.weight is embedding.weight


def set_tied(model: PreTrainedModel, tied: bool) -> None:
    """Set tie_word_embeddings in the config and the text config, which may be the same object."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
