"""Where a command computes, and how much at a time."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from lora_ft.config.load import Config, TrainerConfig
from lora_ft.core.errors import ConfigError
from lora_ft.distributed import processes

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # what `auto` means; fixed, so that a run can be repeated
LONGEST_WAIT = 4 * 3600  # seconds that processes wait for each other: one of them encodes the data for all


def prepare_device(config: Config) -> str:
    """ "cuda" (the current GPU) or "cpu".

    On a CPU denormal numbers are flushed to zero, in all of torch's threads if this comes early.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()
    use_no_more_threads_than_cores()
    torch.set_float32_matmul_precision("high")  # TF32 for float32 bases on GPUs that have it; nothing on a CPU
    return "cuda" if torch.cuda.is_available() and not config.trainer.use_cpu else "cpu"


def meet_others(config: Config, device: str) -> None:
    """Join the other processes of a run that has several. Raises ConfigError as `processes.init_process_group` does."""
    processes.init_process_group(device, config.trainer.ddp_timeout or LONGEST_WAIT, config.trainer.ddp_backend)


def with_accelerate(config: Config) -> Config:
    """The config with what `accelerate launch` and its config file ask for, where the config says nothing of it.

    Raises:
        ConfigError: they ask for what lora-ft hasn't.
    """
    asked = {name.removeprefix("ACCELERATE_"): value for name, value in os.environ.items() if "ACCELERATE_" in name}
    on = {name for name, value in asked.items() if value.lower() in ("true", "1")}
    precision = asked.get("MIXED_PRECISION", "no")
    unknown = on & {"USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"}
    if unknown or precision not in ("no", "bf16"):
        what = ", ".join(sorted(unknown)) or f"mixed precision {precision}"
        raise ConfigError(
            f"accelerate's config asks for {what}, which lora-ft hasn't. It has bf16, and FSDP for a base too big for one "
            "device: run `accelerate config` again, or start with `lora-ft train CONFIG --processes N`."
        )
    os.environ.pop(
        "ACCELERATE_USE_FSDP", None
    )  # the base is sharded by lora_ft.distributed.sharding, not by accelerate
    found = {"use_cpu": "USE_CPU" in on, "fsdp": "USE_FSDP" in on, "bf16": precision == "bf16"}
    return config.model_copy(
        update={"trainer": TrainerConfig(**{k: v for k, v in found.items() if v} | config.trainer.model_dump())}
    )


def micro_batch_tokens(config: Config, device: str) -> int:
    """Tokens of a row at most: the setting, or for `auto` the device type's figure."""
    setting = config.train.micro_batch_tokens
    return MICRO_BATCH_TOKENS[device] if setting == "auto" else setting


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step instead of returning it to the kernel page by page.

    A step frees and asks for the same gigabyte again and again; fetching it anew costs 0.9 us for each 4 KiB.
    """
    mmap_threshold, trim_threshold = -3, -1  # glibc's malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def use_no_more_threads_than_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """Within a container's CPU quota, which torch doesn't know of: more threads than that would wait for each other."""
    if "OMP_NUM_THREADS" in os.environ or not quota.is_file():
        return
    allowed, period = quota.read_text().split()
    if allowed != "max":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), round(int(allowed) / int(period)))))
