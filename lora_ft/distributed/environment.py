"""What a launcher set in the environment: accelerate's settings, and the other processes of the run."""

import os

from lora_ft.config.schema import Config, TrainerConfig
from lora_ft.core.errors import ConfigError
from lora_ft.distributed import processes

TIMEOUT_SECONDS = 4 * 3600  # default of trainer.ddp_timeout: one process may encode the data while the others wait


def join(config: Config, device: str) -> None:
    """Connect to the other processes of this run, if there are any.

    Raises:
        ConfigError: as `processes.init_process_group`.
    """
    processes.init_process_group(device, config.trainer.ddp_timeout or TIMEOUT_SECONDS, config.trainer.ddp_backend)


def with_accelerate_settings(config: Config) -> Config:
    """`config` with the settings of `accelerate launch` and its config file, wherever it has none of its own.

    Raises:
        ConfigError: accelerate asks for something that lora-ft does not support.
    """
    asked = {name.removeprefix("ACCELERATE_"): value for name, value in os.environ.items() if "ACCELERATE_" in name}
    on = {name for name, value in asked.items() if value.lower() in ("true", "1")}
    precision = asked.get("MIXED_PRECISION", "no")
    unsupported = on & {"USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"}
    if unsupported or precision not in ("no", "bf16"):
        what = ", ".join(sorted(unsupported)) or f"mixed precision {precision}"
        raise ConfigError(
            f"accelerate's config asks for {what}, which lora-ft does not support. It supports bf16, and FSDP for a base "
            "too big for one device: run `accelerate config` again, or use `lora-ft train CONFIG --processes N`."
        )
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # lora_ft.distributed.sharding shards the base, not accelerate
    defaults = {"use_cpu": "USE_CPU" in on, "fsdp": "USE_FSDP" in on, "bf16": precision == "bf16"}
    settings = {name: value for name, value in defaults.items() if value} | config.trainer.model_dump()
    return config.model_copy(update={"trainer": TrainerConfig(**settings)})
