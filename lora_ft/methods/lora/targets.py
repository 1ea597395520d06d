"""Which modules of a model `targets`, `modules` and `layers` name; and what to say when they name nothing."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.core import names
from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods.lora.roles import Layout, layout
from lora_ft.nn.lora import ALL_ROWS, LoRALinear, RowBlocks
from lora_ft.nn.multi_lora import MultiLoRALinear


@dataclass(frozen=True)
class Target:
    """A module to adapt: its path in the model, and part -> rows.

    A part is a role, or ALL_ROWS for a module that `modules` named.
    """

    module: str
    rows: dict[str, RowBlocks]


def find_targets(
    model: nn.Module, targets: Sequence[str], modules: Sequence[str] = (), layers: Sequence[int] | None = None
) -> list[Target]:
    """What `targets` (roles or groups of them) and `modules` (exact paths or dotted suffixes) name, in model order.

    A plain projection has one part, a fused one a part a chosen role, in the order of its rows. `layers` keeps only
    what lies in these layers, from 0; what lies outside of all layers (lm_head) is not concerned.

    Raises:
        ConfigError: a word in `targets` is no role.
        ModelError: the architecture is unknown or lacks a role; a name or a layer matches nothing.
    """
    if any(isinstance(module, LoRALinear | MultiLoRALinear) for module in model.modules()):
        raise ModelError("this model has LoRA layers already: merge them, or load the base anew, to adapt it again")
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    found = by_role(model, linear, targets, layers) if targets else {}
    for path in by_name(model, linear, modules, layers):
        whole = RowBlocks.all(outputs(linear[path]))
        if whole not in found.setdefault(path, {ALL_ROWS: whole}).values():
            roles = ", ".join(found[path])
            raise ModelError(f"modules: {path} is adapted by `targets` already (its {roles} rows): drop one of the two")
    if not found:
        raise ModelError("nothing to adapt: `targets` and `modules` are empty, or `layers` is")
    for path in found:
        if not linear[path].weight.is_floating_point():
            raise ModelError(f"{path} is quantized ({linear[path].weight.dtype}): load the base unquantized")
    return [Target(path, found[path]) for path in linear if path in found]


def by_role(
    model: PreTrainedModel, linear: dict[str, nn.Module], targets: Sequence[str], layers: Sequence[int] | None
) -> dict[str, dict[str, RowBlocks]]:
    """Module path -> part -> rows for the roles in `targets`."""
    known = layout(model.config)
    roles = expand(targets, known)
    blocks = model.get_submodule(known.layers)
    if bad := sorted(i for i in layers or () if not 0 <= i < len(blocks)):
        raise ModelError(f"layers {bad}: this model has layers 0 to {len(blocks) - 1}")
    found: dict[str, dict[str, RowBlocks]] = {}
    for index in range(len(blocks)) if layers is None else sorted(layers):
        for role in roles:
            projection = known.projections[role]
            path = f"{known.layers}.{index}.{projection.module}"
            if path not in linear:
                raise ModelError(missing(role, path, blocks[index], known))
            out_features = outputs(linear[path])
            rows = projection.rows or RowBlocks.all(out_features)
            if rows.blocks * rows.width != out_features:
                raise ModelError(
                    f"{path} has {out_features} outputs, but by this config {known.architecture} has {rows.blocks} x "
                    f"{rows.width} there: its {role} rows can't be told; name the module under `modules` instead"
                )
            found.setdefault(path, {})[role] = rows
    return {path: dict(sorted(parts.items(), key=lambda part: part[1].start)) for path, parts in found.items()}


def expand(targets: Sequence[str], known: Layout) -> list[str]:
    """The roles in `targets`, groups resolved to those of their roles that the architecture has."""
    roles: set[str] = set()
    for word in targets:
        if word in names.GROUPS:
            roles.update(role for role in names.GROUPS[word] if role in known.projections)
        elif word not in names.ROLES:
            near = difflib.get_close_matches(word, [*names.ROLES, *names.GROUPS], n=1, cutoff=0)
            raise ConfigError(
                f"targets: {word!r} is no role; nearest is {near[0]!r}. Roles: "
                f"{', '.join([*names.ROLES, *names.GROUPS])}. A module's name belongs under `modules`."
            )
        elif word in known.projections:
            roles.add(word)
        else:
            there = ", ".join(f"{role} ({projection.module})" for role, projection in known.projections.items())
            raise ModelError(f"targets: {known.architecture} has no {word!r} projection. It has {there}.")
    return [role for role in names.ROLES if role in roles]


def missing(role: str, path: str, layer: nn.Module, known: Layout) -> str:
    """Why the role's module isn't in this layer."""
    experts = any(p.dim() == 3 and ".experts." in f".{name}" for name, p in layer.named_parameters())
    if role in names.GROUPS["mlp"] and experts:
        return (
            f"targets: {role!r} can't be adapted: the experts of {known.architecture} are 3-D parameters, not linear "
            f"layers ({path} doesn't exist). Take `attention`, or name linear modules under `modules`."
        )
    return f"targets: {role!r} should be {path}, which is no linear layer of this model. Choose other `layers`."


def by_name(
    model: nn.Module, linear: dict[str, nn.Module], modules: Sequence[str], layers: Sequence[int] | None
) -> list[str]:
    """Paths of the linear modules that each of `modules` is, or is a dotted suffix of."""
    matched = {name: [p for p in linear if matches(p, name) and in_layers(p, layers)] for name in modules}
    lines = []
    for name in (name for name, paths in matched.items() if not paths):
        if outside := [p for p in linear if matches(p, name)]:
            why = f"matches only {summary(outside)}, outside of layers {sorted(layers or ())}"
        elif other := [(p, m) for p, m in model.named_modules() if matches(p, name)]:
            why = f"is {type(other[0][1]).__name__} ({other[0][0]}): only nn.Linear and Conv1D can be adapted"
        else:
            why = f"matches no module. Near: {', '.join(near_names(name, linear))}"
        lines.append(f"modules: {name!r} {why}")
    if lines:
        lines += [f"{name!r} matched {summary(paths)}" for name, paths in matched.items() if paths]
        raise ModelError("\n".join(lines))
    return [path for paths in matched.values() for path in paths]


def matches(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def in_layers(path: str, layers: Sequence[int] | None) -> bool:
    """Whether a path lies in one of `layers`, or in no layer at all. The first number in a path is its layer."""
    index = next((int(part) for part in path.split(".") if part.isdigit()), None)
    return layers is None or index is None or index in layers


def near_names(name: str, linear: dict[str, nn.Module]) -> list[str]:
    """Suffixes of linear modules that look like `name`; all last names if none does."""
    parts = [path.split(".") for path in linear]
    suffixes = {".".join(p[i:]) for p in parts for i in range(len(p)) if not p[i].isdigit()}
    return difflib.get_close_matches(name, sorted(suffixes), n=3, cutoff=0.6) or sorted({p[-1] for p in parts})


def summary(paths: list[str]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def outputs(module: nn.Linear | Conv1D) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features
