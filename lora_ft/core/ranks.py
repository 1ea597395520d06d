"""The numbers with which a launcher (torchrun, accelerate, SLURM, MPI) describes a process in its environment."""

import os

from lora_ft.core.errors import ConfigError


def from_environment(name: str, default: int) -> int:
    """A whole number, not negative, from the environment; `default` if it is not set. Raises ConfigError."""
    text = os.environ.get(name, str(default)).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ConfigError(
            f"{name}={text!r} in the environment: not a number. A launcher such as torchrun sets it; for one process "
            f"unset it: env -u {name} lora-ft ..."
        )
    return int(text)


def world_size() -> int:
    """The number of processes of this run. Raises ConfigError as `from_environment`."""
    return from_environment("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number, from 0. Raises ConfigError as `from_environment`, or if it is not below WORLD_SIZE."""
    number = from_environment("RANK", 0)
    if number >= max(1, world_size()):
        raise ConfigError(
            f"RANK={number} with WORLD_SIZE={world_size()} in the environment: ranks count from 0. Unset both for one "
            "process, or start with `lora-ft train CONFIG --processes N` or torchrun."
        )
    return number
