"""Where a command computes, and how much at a time."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from lora_ft.config import Config
from lora_ft.errors import ConfigError

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # what `auto` means; fixed, so that a run can be repeated


def prepare_device(config: Config) -> str:
    """ "cuda" or "cpu". On a CPU denormal numbers are flushed to zero, in all of torch's threads if this comes early."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this is one of several processes (WORLD_SIZE), which would each train alone: several processes aren't "
            "supported yet. Start lora-ft without a launcher."
        )
    torch.set_flush_denormal(True)
    keep_freed_memory()
    use_no_more_threads_than_cores()
    torch.set_float32_matmul_precision("high")  # TF32 for float32 bases on GPUs that have it; nothing on a CPU
    return "cuda" if torch.cuda.is_available() and not config.trainer.get("use_cpu") else "cpu"


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
