"""LoRA into a model and out of it: freeze, swap; merge and unmerge.

Trainability has one owner: injecting freezes the base and lets what it adds train; `trainable` reads it off.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.targets import Target, find_targets
from lora_ft.nn.lora import InputDropout, LoRALinear
from lora_ft.nn.multi_lora import MultiLoRALinear

__all__ = ["Target", "bare", "disabled", "find_targets", "inject_lora", "lora_layers", "merge", "trainable", "unmerge"]

SAME_INPUT = (("q", "k", "v"), ("gate", "up"))  # roles of a layer whose modules read one tensor


def inject_lora(
    model: nn.Module,
    targets: Sequence[str] = ("q", "v"),
    rank: int = 8,
    alpha: float = 16.0,
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    modules: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    seed: int | None = None,
) -> list[str]:
    """Freeze `model` and adapt what `find_targets` finds, in place. Returns the paths of the adapted modules.

    B is zero, so the model computes what it did. With `seed`, A depends on nothing else. Raises as `find_targets` does.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"rank {rank} must be at least 1, dropout {dropout} at least 0 and below 1")
    found = find_targets(model, targets, modules, layers)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for target in found:
        base = model.get_submodule(target.module)
        layer = LoRALinear.from_base(base, rank, alpha, rslora=rslora, rows=target.rows, generator=generator)
        model.set_submodule(target.module, layer.train(base.training))
    if dropout:
        set_dropout(model, dropout)
    return [target.module for target in found]


def set_dropout(model: nn.Module, p: float) -> None:
    """Dropout on the input of every LoRA layer, one mask for the layers that read one tensor."""
    shared: dict[tuple, InputDropout] = {}
    for path, layer in lora_layers(model).items():
        group = next((roles for roles in SAME_INPUT if set(layer.rows) <= set(roles)), path)
        layer.dropout = shared.setdefault((path.rpartition(".")[0], group), InputDropout(p))
        layer.dropout.readers += 1


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> LoRA layer, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, of any method, by name and in model order; LoRA's are "path.lora_A.part" and "path.lora_B.part"."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def bare(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it the model computes its bare base, whether its adapters were injected or loaded by name."""
    return disabled(layer for layer in model.modules() if isinstance(layer, LoRALinear | MultiLoRALinear))


@contextlib.contextmanager
def disabled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within it each of these layers computes its base alone (`enabled` is False); afterwards each is as it was."""
    before = {layer: layer.enabled for layer in layers}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def merge(model: PreTrainedModel) -> dict[str, LoRALinear]:
    """Swap each LoRA layer for a plain one with W + s B A, in place. Returns the removed layers, which `unmerge` takes.

    A merged head is no longer tied to the embedding, which stays as it is; the config then says so.

    Raises:
        ModelError: the model has no LoRA layers (it was merged already, or never adapted).
    """
    layers = lora_layers(model)
    if not layers:
        raise ModelError(
            "there are no LoRA layers to merge: this model is merged already, was never adapted, or has adapters by "
            "name, of which the one to merge is loaded without a name"
        )
    if ties_head(model, layers):
        set_tied(model, False)
    for path, layer in layers.items():
        model.set_submodule(path, layer.merged())
    return layers


def unmerge(model: PreTrainedModel, layers: dict[str, LoRALinear]) -> None:
    """Put back the layers that `merge` removed: the same objects, so the same bits."""
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    if ties_head(model, layers):
        set_tied(model, True)


def ties_head(model: PreTrainedModel, layers: dict[str, LoRALinear]) -> bool:
    """Whether one of the layers is a head that shares its weight with the input embedding."""
    return any(layer.weight is model.get_input_embeddings().weight for layer in layers.values())


def set_tied(model: PreTrainedModel, tied: bool) -> None:
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
