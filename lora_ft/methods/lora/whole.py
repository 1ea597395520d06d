"""Modules that are trained in full beside A and B (`adapter.train_modules`), which PEFT calls modules_to_save.

Only modules without submodules can be: heads, norms, embeddings. A tied head and its embedding are two modules: each is trained
alone, as in PEFT, and merging unties them.
"""

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.methods.lora.multi import base_modules
from lora_ft.methods.lora.peft import WEIGHTS, AdapterFile, differences
from lora_ft.methods.lora.peft_config import PREFIX, is_saved_whole
from lora_ft.methods.lora.targets import suffixes
from lora_ft.model.stored import is_finite
from lora_ft.nn.adapted import AdaptedModule
from lora_ft.nn.quantized import QuantizedLinear
from lora_ft.nn.whole import WholeModule


def find_whole(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The paths of the modules that `names` (exact paths or dotted suffixes) stand for, in model order.

    Raises ModelError if a name stands for none, or for one that can't be trained in full.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    for name in names:
        matched = [path for path in modules if f".{path}".endswith(f".{name}")]
        if not matched:
            trained = [path for path, module in modules.items() if can_be_trained(module)]
            known = sorted({s for path in trained for s in suffixes(path) if not s.split(".")[0].isdigit()})
            near = ", ".join(difflib.get_close_matches(name, known, n=3) or known[:3])
            raise ModelError(f"adapter.train_modules: {name!r} matches no module. Near: {near}")
        for path in matched:
            if not can_be_trained(modules[path]):
                kind = type(modules[path]).__name__
                problem = f"{name!r} is {path} ({kind}), which holds other modules, or is quantized"
                raise ModelError(f"adapter.train_modules: {problem}. Name heads, norms or embeddings.")
    return [path for path in modules if any(f".{path}".endswith(f".{name}") for name in names)]


def can_be_trained(module: nn.Module) -> bool:
    """Whether a module has no submodules, and weights in a floating-point type, not quantized."""
    if any(module.children()) or isinstance(module, QuantizedLinear):
        return False
    parameters = list(module.parameters())
    return bool(parameters) and all(p.is_floating_point() for p in parameters)


def train_whole(model: nn.Module, paths: Sequence[str]) -> None:
    """Train these modules in full, beside LoRA layers that `model` has. Raises ModelError if one of them has LoRA."""
    for path in paths:
        base = model.get_submodule(path)
        if isinstance(base, AdaptedModule):
            way_out = "adapted by `targets` or `modules` already: leave it out of one of the two"
            raise ModelError(f"adapter.train_modules: {path} is {way_out}")
        model.set_submodule(path, WholeModule(base).train(base.training))


def whole_modules(model: nn.Module) -> dict[str, WholeModule]:
    """Path -> module that is trained in full, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, WholeModule)}


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name in the base -> the trained tensor, float32."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, module in whole_modules(model).items()
        for name, parameter in module.trained.named_parameters()
    }


def modules_to_save(model: nn.Module) -> list[str]:
    """The shortest dotted suffixes of the modules that are trained in full, by PEFT's rule, and of no other."""
    whole = whole_modules(model)
    others = [path for path in base_modules(model) if path not in whole]
    return sorted({next(s for s in suffixes(path) if not any(o.endswith(s) for o in others)) for path in whole})


def check_whole(model: nn.Module, adapter: AdapterFile) -> set[str]:
    """Check that the modules that an adapter has in full are those of `model`, which may be on meta. Returns their paths.

    ModelError names modules that are missing, can't be replaced, or have another shape.
    """
    path, names = adapter.folder / WEIGHTS, adapter.trained.adapter_config.get("modules_to_save") or []
    modules = base_modules(model)
    expected = {name: module for name, module in modules.items() if is_saved_whole(name, names)}
    for name, module in expected.items():
        if not can_be_trained(module):
            kind = f"{name} ({type(module).__name__}) holds other modules, or is quantized"
            raise ModelError(
                f"{adapter.folder}: modules_to_save: {kind}: it can't be applied here. Merge it with PEFT."
            )
    shapes = {f"{name}.{leaf}": p.shape for name, module in expected.items() for leaf, p in module.named_parameters()}
    if shapes.keys() != adapter.whole.keys():
        raise ModelError(differences(path, shapes.keys() - adapter.whole.keys(), adapter.whole.keys() - shapes.keys()))
    for name, shape in shapes.items():
        if (found := adapter.whole[name].shape) != shape:
            problem = f"{PREFIX}{name} has shape {tuple(found)}, the model needs {tuple(shape)}"
            raise ModelError(f"{path}: {problem}. If its vocabulary was resized, merge the adapter with PEFT.")
    return {*expected}


def trained_value(adapter: AdapterFile, name: str) -> Tensor:
    """The trained tensor of this name in float32. Raises ModelError for NaN or inf, or another type."""
    tensor, key = adapter.whole[name], f"{adapter.folder / WEIGHTS}: {PREFIX}{name}"
    if not tensor.is_floating_point():
        raise ModelError(f"{key} is {tensor.dtype}, not a floating-point type.")
    if not is_finite(tensor):
        raise ModelError(f"{key} contains NaN or inf.")
    return tensor.float()


def apply_whole(model: nn.Module, adapter: AdapterFile, trainable: bool) -> None:
    """Put the modules that an adapter has in full, checked by `check_whole`, into `model`."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in adapter.whole)
    train_whole(model, list(paths))
    copy_whole(model, adapter)
    for path in paths:
        model.get_submodule(path).trained.requires_grad_(trainable)


def copy_whole(model: nn.Module, adapter: AdapterFile) -> None:
    """Copy what an adapter has in full into the modules that `model` trains in full; ModelError unless they are the same."""
    ours: Mapping[str, Tensor] = whole_tensors(model)
    if ours.keys() != adapter.whole.keys():
        missing, unexpected = ours.keys() - adapter.whole.keys(), adapter.whole.keys() - ours.keys()
        lists = differences(adapter.folder / WEIGHTS, missing, unexpected)
        raise ModelError(f"{lists} Make adapter.train_modules the same.")
    for name, parameter in ours.items():
        value = trained_value(adapter, name)
        if value.shape != parameter.shape:
            problem = f"{PREFIX}{name} has shape {tuple(value.shape)}, the model needs {tuple(parameter.shape)}"
            raise ModelError(f"{adapter.folder / WEIGHTS}: {problem}.")
        parameter.copy_(value)


def refuse_whole(adapter: AdapterFile, what: str, way_out: str) -> None:
    """Raise ModelError, with what is so and the way out, if an adapter has more than A and B."""
    has = [f"modules trained in full ({listed(whole_paths(adapter), 3)})"] if adapter.whole else []
    has += ["trained embedding rows"] if adapter.rows else []
    if has:
        raise ModelError(f"{adapter.folder}: has {' and '.join(has)}; {what}. {way_out}")


def whole_paths(adapter: AdapterFile) -> list[str]:
    """The paths of the modules that an adapter has in full, sorted."""
    return sorted({name.rpartition(".")[0] for name in adapter.whole})
