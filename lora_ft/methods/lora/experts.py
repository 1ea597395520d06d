"""LoRA on the experts of a mixture: their layers in a model, and their A and B to and from PEFT's `target_parameters`.

PEFT adapts a parameter (experts, out, in) as one: its A (experts * rank, in) has the experts' A under each other, and column
r * experts + e of its B (out, rank * experts) is column r of expert e's B. The tensors of a module's last adapted parameter
have the module's name, those of the one before it `.base_layer` behind that.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_ft.core.errors import ModelError
from lora_ft.nn.expert_names import PARAMETERS, PATH, is_targeted
from lora_ft.nn.experts import UnpackedExperts, is_packed

Pairs = dict[str, tuple[Tensor, Tensor]]  # module -> A and B
INNER = ".base_layer"


def unpack(model: nn.Module, paths: Iterable[str]) -> None:
    """Give each expert of the mixtures at `paths` linear layers of its own, in place.

    Raises:
        ModelError: the base is sharded.
    """
    for path in paths:
        module = model.get_submodule(path)
        if hasattr(module.down_proj, "full_tensor"):
            raise ModelError(f"{path}: experts can't be adapted with trainer.fsdp: leave one of the two out")
        model.set_submodule(path, UnpackedExperts(module).train(module.training))


def unpack_for(model: nn.Module, modules: Iterable[str]) -> None:
    """`unpack` the experts of the model that are among the `modules` of an adapter."""
    adapted = {match[1] for module in modules if (match := PATH.fullmatch(module))}
    unpack(model, [path for path, module in model.named_modules() if path in adapted and is_packed(module)])


def require_all(model: nn.Module, modules: Iterable[str]) -> None:
    """Raise ModelError unless an adapted parameter is adapted for all experts."""
    adapted = set(modules)
    for path, mixture in model.named_modules():
        if isinstance(mixture, UnpackedExperts):
            for name in PARAMETERS:
                own = {f"{path}.{name}.{i}" for i in range(len(getattr(mixture, name, ())))}
                if own & adapted and own - adapted:
                    raise ModelError(
                        f"{path}.{name}: some experts are adapted and some are not; PEFT's format has all or none"
                    )


def packed(pairs: Pairs) -> tuple[Pairs, list[str]]:
    """PEFT's matrices by module, and target_parameters."""
    named = {module: pair for module, pair in pairs.items() if not PATH.fullmatch(module)}
    experts: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
    for module, pair in pairs.items():
        if match := PATH.fullmatch(module):
            experts.setdefault(match[1], {}).setdefault(match[2], []).append(pair)
    parameters = []
    for path, by_name in experts.items():
        names = [name for name in PARAMETERS if name in by_name]
        parameters += [f"{path}.{name}" for name in names]
        for depth, name in enumerate(reversed(names)):
            A, B = (torch.stack(matrices) for matrices in zip(*by_name[name], strict=True))
            named[path + depth * INNER] = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1).contiguous()
    return named, parameters


def unpacked(path: Path, pairs: Pairs, parameters: list[str], rank_of: Callable[[str], int]) -> Pairs:
    """The inverse of `packed`. rank_of: of a parameter by name. ModelError, with the file's `path`, if it can't be."""
    if other := [name for name in parameters if name.rpartition(".")[2] not in PARAMETERS]:
        problem = f"LoRA on the parameter {other[0]} (target_parameters) can't be applied here"
        raise ModelError(f"{path}: {problem}, only that on experts' {', '.join(PARAMETERS)}. Merge it with PEFT.")
    result: Pairs = {}
    for module, (A, B) in pairs.items():
        mixture = module
        while mixture.endswith(INNER):
            mixture = mixture.removesuffix(INNER)
        names = [name for name in PARAMETERS if is_targeted(f"{mixture}.{name}", parameters)]
        depth = (len(module) - len(mixture)) // len(INNER)
        if depth >= len(names):
            result[module] = A, B
            continue
        parameter = f"{mixture}.{names[-1 - depth]}"
        rank = rank_of(parameter)
        if A.ndim != 2 or B.ndim != 2 or len(A) % rank or B.shape[1] != len(A):
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise ModelError(f"{path}: {parameter} has {shapes}, which are not those of experts of rank {rank}.")
        by_expert = B.unflatten(1, (rank, -1))
        for expert, own in enumerate(A.split(rank)):
            result[f"{parameter}.{expert}"] = own, by_expert[..., expert]
    return result
