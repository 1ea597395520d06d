"""Several adapters on one model, each with a name: switch between them, or select one for each row of a batch."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import printable
from lora_ft.core.names import nearest
from lora_ft.nn.lora import LoRALinear
from lora_ft.nn.multi_lora import MultiLoRALinear


def use(model: nn.Module, name: str | None) -> None:
    """Switch `model` to adapter `name`, or to its bare base (None). No weight is moved or changed."""
    check_names(adapter_names(model), [name])
    for layer in shared_layers(model).values():
        layer.use(name)


@contextlib.contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within it row i of a batch is computed with adapter `names[i]` (None: the bare base), all in one forward pass.

    A batch of n * len(names) rows has n rows for each name, in the order in which transformers' `generate` repeats rows for
    beams. Afterwards the model computes its bare base. Experts can't be mixed: ModelError.
    """
    check_names(adapter_names(model), names)
    layers = shared_layers(model)
    for path, layer in layers.items():
        if is_expert(path) and not layer.adapters.keys().isdisjoint(names):
            reason = "an expert's input is tokens without their rows, so a batch can't mix adapters there"
            raise ModelError(f"{path}: {reason}")
    try:
        for layer in layers.values():
            layer.mix(names)
        yield
    finally:
        for layer in layers.values():
            layer.use(None)


def is_expert(path: str) -> bool:
    """Whether a layer is one of experts, whose input is tokens without their rows."""
    return "experts" in path.split(".")


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that were loaded by name, in the order of loading."""
    return list(dict.fromkeys(name for layer in shared_layers(model).values() for name in layer.adapters))


def add_adapter(model: nn.Module, name: str, layers: dict[str, LoRALinear]) -> None:
    """Add an adapter, of a new name, without switching to it. layers: path -> its LoRALinear over the base layer there."""
    if name in adapter_names(model):
        raise ModelError(f"the model has an adapter {printable(name)} already: load this one with another name")
    shared = shared_layers(model)
    for path, layer in layers.items():
        if path not in shared:
            shared[path] = MultiLoRALinear(layer.base).train(layer.training)
            model.set_submodule(path, shared[path])
        shared[path].adapters[name] = layer


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter and free its memory; the model computes its bare base afterwards."""
    check_names(adapter_names(model), [name])
    for layer in shared_layers(model).values():
        layer.use(None)
        layer.adapters.pop(name, None)


def shared_layers(model: nn.Module) -> dict[str, MultiLoRALinear]:
    """Path -> layer that has adapters by name, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MultiLoRALinear)}


def base_layer(module: nn.Module) -> nn.Module:
    """The base's layer: `module` itself, or the layer that it wraps for adapters by name."""
    return module.base if isinstance(module, MultiLoRALinear) else module


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of the base, without the wrappers for adapters by name."""
    inside = {f"{path}.base" for path in shared_layers(model)}
    return {path: base_layer(module) for path, module in model.named_modules() if path not in inside}


def check_names(known: Sequence[str], names: Sequence[str | None]) -> None:
    """Raise ModelError, with the nearest name, unless each name that is not None is among the `known` ones."""
    for name in dict.fromkeys(names):
        if name is not None and name not in known:
            hint = f" Did you mean {printable(near)}?" if (near := nearest(name, known)) else ""
            loaded = ", ".join(map(printable, known)) or "none"
            raise ModelError(f"no adapter {printable(name)}; loaded are {loaded}.{hint}")
