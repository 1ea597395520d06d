"""Several adapters on one model, each by its name: switch between them, or give every row of a batch its own."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import printable
from lora_ft.core.names import nearest
from lora_ft.nn.lora import LoRALinear
from lora_ft.nn.multi_lora import MultiLoRALinear


def use(model: nn.Module, name: str | None) -> None:
    """From now on `model` computes with adapter `name`, or with None its bare base. No weight is moved or changed.

    Raises:
        ModelError: no adapter of that name; the nearest is told.
    """
    check_names(model, [name])
    for layer in shared_layers(model).values():
        layer.use(name)


@contextlib.contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, row i of a batch is computed with adapter `names[i]` (None: the bare base), all in one forward pass.

    A batch of n * len(names) rows is taken as n rows for each name, as `generate` expands it for beams. Afterwards the
    model computes its bare base.

    Raises:
        ModelError: no adapter of that name; or an adapted expert, which gets tokens without their rows.
    """
    check_names(model, names)
    layers = shared_layers(model)
    for path, layer in layers.items():
        if "experts" in path.split(".") and not layer.adapters.keys().isdisjoint(names):
            raise ModelError(f"{path}: an expert is given tokens, not rows, so a batch can't mix adapters there")
    try:
        for layer in layers.values():
            layer.mix(names)
        yield
    finally:
        for layer in layers.values():
            layer.use(None)


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that were loaded by name."""
    return list(dict.fromkeys(name for layer in shared_layers(model).values() for name in layer.adapters))


def add_adapter(model: nn.Module, name: str, layers: dict[str, LoRALinear]) -> None:
    """Take `layers` (path -> layer over the base that stands there) as adapter `name`; nothing uses it yet.

    Raises:
        ModelError: the name is taken.
    """
    if name in adapter_names(model):
        raise ModelError(f"the model has an adapter {printable(name)} already: load this one by another name")
    shared = shared_layers(model)
    for path, layer in layers.items():
        if path not in shared:
            shared[path] = MultiLoRALinear(layer.base).train(layer.training)
            model.set_submodule(path, shared[path])
        shared[path].adapters[name] = layer


def shared_layers(model: nn.Module) -> dict[str, MultiLoRALinear]:
    """Path -> layer with adapters by name, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MultiLoRALinear)}


def bare(module: nn.Module) -> nn.Module:
    """The layer of the base model that `module` is, or stands for."""
    return module.base if isinstance(module, MultiLoRALinear) else module


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module as the base model has them, whatever adapters were added by name."""
    inside = {f"{path}.base" for path in shared_layers(model)}
    return {path: bare(module) for path, module in model.named_modules() if path not in inside}


def check_names(model: nn.Module, names: Sequence[str | None]) -> None:
    known = adapter_names(model)
    for name in dict.fromkeys(names):
        if name is not None and name not in known:
            near = nearest(name, known)
            hint = f" Is {printable(near)} meant?" if near else ""
            there = ", ".join(map(printable, known)) or "none"
            raise ModelError(f"no adapter {printable(name)}; there is {there}.{hint}")
