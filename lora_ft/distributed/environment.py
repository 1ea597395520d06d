"""The settings that `accelerate launch` leaves in the environment."""

import os
from collections.abc import Mapping

from accelerate.utils.environment import str_to_bool

from lora_ft.config.load import parse_config
from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError


def with_accelerate_settings(configs: Mapping[str, Config]) -> dict[str, Config]:
    """The configs with the settings of `accelerate launch` and its config file, wherever they have none of their own.

    Removes FSDP's flag from the environment, so it is called once, with all configs of the process.

    Raises:
        ConfigError: accelerate asks for something that lora-ft does not support, or not with these settings.
        ValueError: one of its flags is neither true nor false.
    """
    asked = {name.removeprefix("ACCELERATE_"): value for name, value in os.environ.items() if "ACCELERATE_" in name}
    on = {name for name, value in asked.items() if name.startswith("USE_") and str_to_bool(value)}
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
    settings = {name: True for name, value in defaults.items() if value}
    if not settings:
        return {**configs}
    values = {name: config.model_dump(mode="json") for name, config in configs.items()}
    return {
        name: parse_config(of | {"trainer": settings | of["trainer"]}, source="accelerate's config")
        for name, of in values.items()
    }
