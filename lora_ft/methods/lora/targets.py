"""Find the modules of a model that `targets`, `modules` and `layers` name."""

import difflib
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.core import names
from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import listed
from lora_ft.methods.lora.experts import unpack
from lora_ft.methods.lora.roles import Architecture, architecture_of
from lora_ft.nn.adapted import AdaptedModule, place
from lora_ft.nn.experts import UnpackedExperts, is_packed
from lora_ft.nn.lora import ALL_ROWS, RowBlocks

PartRows = dict[str, RowBlocks]  # a role, or ALL_ROWS if `modules` names the module -> rows of the module's output


def find_targets(
    model: nn.Module, targets: Sequence[str], modules: Sequence[str] = (), layers: Sequence[int] | None = None
) -> dict[str, PartRows]:
    """Path -> parts of the modules to adapt, in model order. A fused module has one part for each chosen role, in row order.

    Args:
        model: not yet adapted; may be on the meta device.
        targets: roles, or groups of roles; ConfigError for another word.
        modules: exact paths or dotted suffixes of linear modules.
        layers: adapt only modules in these layers (the first is 0), and those outside all layers, such as lm_head.
    """
    if any(isinstance(module, AdaptedModule) for module in model.modules()):
        raise ModelError(
            "this model has adapter layers already: merge them, or load the base again, before adapting it"
        )
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    parts = by_role(model, linear, targets, layers) if targets else {}
    for path in by_name(model, linear, modules, layers):
        whole = RowBlocks.all(outputs(linear[path]))
        if whole not in parts.setdefault(path, {ALL_ROWS: whole}).values():
            rows = f"{', '.join(parts[path])} rows"
            raise ModelError(f"modules: {path} is adapted by `targets` already (its {rows}): remove one of the two")
    if not parts:
        raise ModelError("nothing to adapt: `targets` and `modules` are both empty, or `layers` is")
    for path in parts:
        if not (dtype := place(linear[path])[0]).is_floating_point:
            raise ModelError(f"{path} is quantized ({dtype}): load the base unquantized")
    return {path: parts[path] for path in linear if path in parts}


def by_role(
    model: PreTrainedModel, linear: dict[str, nn.Module], targets: Sequence[str], layers: Sequence[int] | None
) -> dict[str, PartRows]:
    """Path -> parts of the modules that have roles in `targets`."""
    architecture = architecture_of(model.config)
    roles = expand(targets, architecture)
    blocks = model.get_submodule(architecture.layers)
    if bad := sorted(i for i in layers or () if not 0 <= i < len(blocks)):
        raise ModelError(f"layers {bad}: this model has layers 0 to {len(blocks) - 1}")
    parts: dict[str, PartRows] = {}
    for index in range(len(blocks)) if layers is None else sorted(layers):
        for role in roles:
            projection = architecture.projections[role]
            path = f"{architecture.layers}.{index}.{projection.module}"
            if path not in linear:
                experts = of_experts(f"{architecture.layers}.{index}", blocks[index], role)
                if not experts:
                    raise ModelError(missing(role, path, blocks[index], architecture))
                for path, rows in experts.items():
                    parts.setdefault(path, {})[role] = rows
                continue
            out_features = outputs(linear[path])
            rows = projection.rows or RowBlocks.all(out_features)
            if rows.blocks * rows.width != out_features:
                raise ModelError(
                    f"{path} has {out_features} outputs, but {architecture.name} with this config should have "
                    f"{rows.blocks} x {rows.width}: its {role} rows are unknown; name the module under `modules` instead"
                )
            parts.setdefault(path, {})[role] = rows
    return {path: dict(sorted(rows.items(), key=lambda part: part[1].start)) for path, rows in parts.items()}


def of_experts(path: str, layer: nn.Module, role: str) -> dict[str, RowBlocks]:
    """Path -> rows of the experts' layers in a layer at `path` that have a role; none if they are not unpacked."""
    for name, module in layer.named_modules():
        if isinstance(module, UnpackedExperts) and role in (of_roles := module.rows()):
            parameter, rows = of_roles[role]
            return {f"{path}.{name}.{parameter}.{i}": rows for i in range(len(module.get_submodule(parameter)))}
    return {}


def unpack_targets(model: PreTrainedModel, targets: Sequence[str], layers: Sequence[int] | None) -> None:
    """Give the experts of the layers to adapt linear layers of their own, in place, if MLP roles are among the targets."""
    if not targets or not any(role in names.GROUPS["mlp"] for role in expand(targets, architecture_of(model.config))):
        return
    inside = architecture_of(model.config).layers
    blocks = [f"{inside}.{i}." for i in (range(len(model.get_submodule(inside))) if layers is None else layers)]
    unpack(model, [p for p, m in model.named_modules() if is_packed(m) and p.startswith(tuple(blocks))])


def expand(targets: Sequence[str], architecture: Architecture) -> list[str]:
    """The roles in `targets`; a group stands for those of its roles that the architecture has."""
    roles: set[str] = set()
    for word in targets:
        if word in names.GROUPS:
            roles.update(role for role in names.GROUPS[word] if role in architecture.projections)
        elif word not in names.ROLES:
            raise ConfigError(
                f"targets: unknown role {word!r}; the nearest is {names.nearest_role(word)!r}. "
                f"Roles: {', '.join([*names.ROLES, *names.GROUPS])}. Name a module under `modules`."
            )
        elif word in architecture.projections:
            roles.add(word)
        else:
            has = ", ".join(f"{role} ({projection.module})" for role, projection in architecture.projections.items())
            raise ModelError(f"targets: {architecture.name} has no {word!r} projection. It has {has}.")
    return [role for role in names.ROLES if role in roles]


def missing(role: str, path: str, layer: nn.Module, architecture: Architecture) -> str:
    """The error message for a layer that lacks the role's module."""
    experts = any(p.dim() == 3 and ".experts." in f".{name}" for name, p in layer.named_parameters())
    if role in names.GROUPS["mlp"] and experts:
        problem = f"the experts of {architecture.name} are 3-D parameters, not linear layers ({path} does not exist)"
        way_out = "Use `attention`, or name linear modules under `modules`."
        return f"targets: {role!r} can't be adapted: {problem}. {way_out}"
    return f"targets: {role!r} should be {path}, which is not a linear layer of this model. Choose other `layers`."


def by_name(
    model: nn.Module, linear: dict[str, nn.Module], modules: Sequence[str], layers: Sequence[int] | None
) -> list[str]:
    """The paths of the linear modules whose path is one of `modules` or ends in one; ModelError if one matches nothing."""

    def matches(path: str, name: str) -> bool:
        return f".{path}".endswith(f".{name}")

    def in_layers(path: str) -> bool:  # or outside all layers; the first number in a path is its layer
        index = next((int(part) for part in path.split(".") if part.isdigit()), None)
        return layers is None or index is None or index in layers

    matched = {name: [p for p in linear if matches(p, name) and in_layers(p)] for name in modules}
    lines = []
    for name in (name for name, paths in matched.items() if not paths):
        if outside := [p for p in linear if matches(p, name)]:
            why = f"matches only {listed(outside, 1)}, outside layers {sorted(layers or ())}"
        elif others := [(p, m) for p, m in model.named_modules() if matches(p, name)]:
            why = f"is {type(others[0][1]).__name__} ({others[0][0]}): only nn.Linear and Conv1D can be adapted"
        else:
            known = {suffix for path in linear for suffix in suffixes(path) if not suffix.split(".")[0].isdigit()}
            near = difflib.get_close_matches(name, sorted(known), n=3)
            why = f"matches no module. Near: {', '.join(near or sorted({suffixes(path)[0] for path in linear}))}"
        lines.append(f"modules: {name!r} {why}")
    if lines:
        lines += [f"{name!r} matched {listed(paths, 1)}" for name, paths in matched.items() if paths]
        raise ModelError("\n".join(lines))
    return [path for paths in matched.values() for path in paths]


def suffixes(path: str) -> list[str]:
    """The dotted suffixes of a path, shortest first: c_attn, attn.c_attn, 0.attn.c_attn, ..."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def outputs(module: nn.Linear | Conv1D) -> int:
    """The number of output features."""
    return module.nf if isinstance(module, Conv1D) else module.out_features
