"""The device of a command: choosing it, its memory, and how many tokens it computes at a time."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from lora_ft.core import machine
from lora_ft.core.ranks import world_size

# The values of `auto`: constants, so that runs are reproducible. mps: a Mac's GPU, which has few cores and shares its memory
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192, "mps": 2048}


def prepare_device(use_cpu: bool = False) -> str:
    """Choose "cuda" (the current GPU), "mps" (a Mac's), or if there is none or `use_cpu` "cpu", and set torch up for it.

    The processes of a run can't share a Mac's GPU: they use the CPU.
    """
    torch.set_flush_denormal(True)  # on a CPU, in all threads that torch starts after this call
    machine.keep_freed_memory()
    limit_threads()
    torch.set_float32_matmul_precision("high")  # TF32 for float32 bases on GPUs that have it; no effect on a CPU
    if use_cpu:
        return "cpu"
    has_mps = torch.backends.mps.is_available() and world_size() == 1
    return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"


def computes(dtype: torch.dtype, device: str) -> bool:
    """Whether a device computes in a dtype: a CPU has no float16, a Mac's GPU no bfloat16 before macOS 14."""
    if device == "mps" and dtype is torch.bfloat16:
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return not (device == "cpu" and dtype is torch.float16)


def limit_threads() -> None:
    """Use at most as many threads as this process has cores: torch ignores a container's CPU quota."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), machine.cores()))


def micro_batch_tokens(setting: int | str, device: str) -> int:
    """The most tokens in a row: the setting train.micro_batch_tokens, with `auto` resolved for the device."""
    return MICRO_BATCH_TOKENS[device] if setting == "auto" else int(setting)


def free_memory(device: str) -> int:
    """Bytes that this process can still allocate on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    limits = [machine.free_memory().size]
    if device == "mps":
        limits.append(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(limits)


def peak_memory_mb(device: str) -> float:
    """The most memory in use at once, in MiB: of the GPU's allocator, or of this process on a CPU.

    A Mac's allocator does not count that: what it holds, freed memory too, is close.
    """
    peaks = {"cuda": torch.cuda.max_memory_allocated, "mps": torch.mps.driver_allocated_memory}
    return round(peaks.get(device, machine.peak_memory)() / 2**20, 1)


def random_states() -> dict[str, torch.Tensor]:
    """The states of torch's random generators: of the CPU, and of the current GPU under its kind, if it was used."""
    used = {kind: gpu for kind, gpu in _gpus().items() if kind != "cuda" or gpu.is_initialized()}
    return {"torch": torch.get_rng_state()} | {kind: gpu.get_rng_state() for kind, gpu in used.items()}


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Set the generators to states of `random_states`, those that this machine has."""
    torch.set_rng_state(states["torch"])
    for kind, gpu in _gpus().items():
        if kind in states:
            gpu.set_rng_state(states[kind])


def _gpus() -> dict[str, Any]:
    """torch's modules of the kinds of GPU that there are."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {kind: getattr(torch, kind) for kind, available in there.items() if available}
