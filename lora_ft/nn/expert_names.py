"""The names of experts' layers, see nn/experts.py. Imports no torch."""

import re
from collections.abc import Iterable

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")  # of all experts, in the order in which a module has them
PATH = re.compile(rf"(.+)\.({'|'.join(PARAMETERS)})\.(\d+)")  # of an expert's layer: module, parameter, expert


def parameter_of(module: str) -> str:
    """The name by which PEFT knows a module: for an expert's layer that of the parameter of all experts."""
    match = PATH.fullmatch(module)
    return f"{match[1]}.{match[2]}" if match else module


def is_targeted(parameter: str, targets: Iterable[str]) -> bool:
    """Whether one of PEFT's target_parameters stands for a parameter: it is its path or ends it."""
    return any(f".{parameter}".endswith(f".{target}") for target in targets)
