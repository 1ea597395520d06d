"""Where a command computes, and how much at a time."""

import os

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
    return "cuda" if torch.cuda.is_available() and not config.trainer.get("use_cpu") else "cpu"


def micro_batch_tokens(config: Config, device: str) -> int:
    """Tokens of a row at most: the setting, or for `auto` the device type's figure."""
    setting = config.train.micro_batch_tokens
    return MICRO_BATCH_TOKENS[device] if setting == "auto" else setting
