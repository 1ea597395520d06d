"""The device of a command: choosing it, its memory, and how many tokens it computes at a time."""

import os

import torch

from lora_ft.core import machine

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # the values of `auto`: constants, so that runs are reproducible


def prepare_device(use_cpu: bool = False) -> str:
    """Choose "cuda" (the current GPU) if there is one and `use_cpu` is false, else "cpu", and set torch up for it."""
    torch.set_flush_denormal(True)  # on a CPU, in all threads that torch starts after this call
    machine.keep_freed_memory()
    limit_threads()
    torch.set_float32_matmul_precision("high")  # TF32 for float32 bases on GPUs that have it; no effect on a CPU
    return "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"


def limit_threads() -> None:
    """Use at most as many threads as this process has cores: torch ignores a container's CPU quota."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), machine.cores()))


def micro_batch_tokens(setting: int | str, device: str) -> int:
    """The most tokens in a row: the setting train.micro_batch_tokens, with `auto` resolved for the device."""
    return MICRO_BATCH_TOKENS[device] if setting == "auto" else int(setting)


def free_memory(device: str) -> int:
    """Bytes that this process can still allocate on the device."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else machine.free_memory().size


def peak_memory_mb(device: str) -> float:
    """The most memory in use at once, in MiB: of the GPU's allocator, or of this process on a CPU."""
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else machine.peak_memory()
    return round(peak / 2**20, 1)
