"""Where PEFT's files have the A and B of experts (`target_parameters`). Imports no torch: arrays are tensors or NumPy's.

PEFT adapts a parameter (experts, out, in) as one: its A (experts * rank, in) has the experts' A under each other, and column
r * experts + e of its B (out, rank * experts) is column r of expert e's B. The tensors of a module's last adapted parameter
have the module's name, those of the one before it `.base_layer` behind that.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ft.core.errors import ModelError
from lora_ft.nn.expert_names import PARAMETERS, is_targeted

INNER = ".base_layer"


def expert_parameter(module: str, parameters: Sequence[str]) -> str | None:
    """The parameter of experts whose A and B a file has under the name of a module; None for a module's own."""
    mixture, depth = module, 0
    while mixture.endswith(INNER):
        mixture, depth = mixture.removesuffix(INNER), depth + 1
    names = [name for name in PARAMETERS if is_targeted(f"{mixture}.{name}", parameters)]
    return f"{mixture}.{names[-1 - depth]}" if depth < len(names) else None


def by_expert(A: Any, B: Any, rank: int) -> list[tuple[Any, Any]] | None:
    """The A (rank, in) and B (out, rank) of each expert, of a parameter's two matrices; None if they don't fit."""
    if A.ndim != 2 or B.ndim != 2 or not len(A) or len(A) % rank or B.shape[1] != len(A):
        return None
    count = len(A) // rank
    return [(A[e * rank : (e + 1) * rank], B[:, e::count]) for e in range(count)]


def unpacked(
    path: Path, pairs: Mapping[str, tuple[Any, Any]], parameters: Sequence[str], rank_of: Callable[[str], int]
) -> dict[str, tuple[Any, Any]]:
    """The A and B of each module and of each expert's layer. rank_of: of a parameter, by name.

    ModelError, with the file's `path`, for parameters that are not of experts, and matrices that don't fit.
    """
    if other := [name for name in parameters if name.rpartition(".")[2] not in PARAMETERS]:
        problem = f"LoRA on the parameter {other[0]} (target_parameters) can't be applied here"
        raise ModelError(f"{path}: {problem}, only that on experts' {', '.join(PARAMETERS)}. Merge it with PEFT.")
    result = {}
    for module, (A, B) in pairs.items():
        parameter = expert_parameter(module, parameters)
        if parameter is None:
            result[module] = A, B
            continue
        rank = rank_of(parameter)
        if (experts := by_expert(A, B, rank)) is None:
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise ModelError(f"{path}: {parameter} has {shapes}, which are not those of experts of rank {rank}.")
        result |= {f"{parameter}.{expert}": pair for expert, pair in enumerate(experts)}
    return result
