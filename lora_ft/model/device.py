"""The device of a command: choosing it, its memory, and how many tokens it computes at a time."""

import os
from collections.abc import Mapping

import torch

from lora_ft.core import machine
from lora_ft.core.messages import warn
from lora_ft.core.ranks import world_size

# The values of `auto`: constants, so that runs are reproducible. mps: a Mac's GPU, which has few cores; xpu: Intel's
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192, "mps": 2048, "xpu": 8192}
OWN_MEMORY = ("cuda", "xpu")  # the others share the CPU's


def prepare_device(use_cpu: bool = False) -> str:
    """Choose the current GPU's kind ("cuda", "mps" or "xpu"), or if there is none or `use_cpu` "cpu", and set torch up for it.

    The processes of a run share no GPU of a Mac or of Intel: they use the CPU.
    """
    equal_products()
    torch.set_flush_denormal(True)  # on a CPU, in all threads that torch starts after this call
    machine.keep_freed_memory()
    limit_threads()
    torch.set_float32_matmul_precision("high")  # TF32 for float32 bases on GPUs that have it; no effect on a CPU
    found = "cpu" if use_cpu else accelerator()
    if found not in MICRO_BATCH_TOKENS:
        warn(f"the device {found!r} is not supported: the CPU is used.")
        return "cpu"
    return found if found == "cuda" or world_size() == 1 else "cpu"


def equal_products() -> None:
    """Have MKL compute a row of a product alike whatever other rows there are, in products after this call; it is as fast.

    Else it may split sums between threads where rows are few, and a run's last bits depend on those trained together with it.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def accelerator() -> str:
    """The kind of the accelerator that torch uses on this machine, "cpu" if there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


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
    if device in OWN_MEMORY:
        return torch.get_device_module(device).mem_get_info()[0]
    limits = [machine.free_memory().size]
    if device == "mps":
        limits.append(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(limits)


def peak_memory_mb(device: str) -> float:
    """The most memory in use at once, in MiB: of the GPU's allocator, or of this process on a CPU.

    A Mac's allocator does not count that: what it holds, freed memory too, is close.
    """
    if device in OWN_MEMORY:
        peak = torch.get_device_module(device).max_memory_allocated()
    else:
        peak = torch.mps.driver_allocated_memory() if device == "mps" else machine.peak_memory()
    return round(peak / 2**20, 1)


def random_states() -> dict[str, torch.Tensor]:
    """The states of torch's random generators: of the CPU, and of the current GPU under its kind, if it was used."""
    kind, states = accelerator(), {"torch": torch.get_rng_state()}
    if kind in MICRO_BATCH_TOKENS and kind != "cpu":
        gpu = torch.get_device_module(kind)
        if kind == "mps" or gpu.is_initialized():
            states[kind] = gpu.get_rng_state()
    return states


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Set the generators to states of `random_states`, those that this machine has."""
    torch.set_rng_state(states["torch"])
    if (kind := accelerator()) in states:
        torch.get_device_module(kind).set_rng_state(states[kind])
