"""Which configs can be trained together, in one pass over one base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value

# What the runs have in common, because they share the base, the rows, or the process
SHARED = (
    *("model.name", "model.revision", "model.dtype", "model.quantization"),
    *("train.micro_batch_tokens", "train.gradient_checkpointing", "trainer.use_cpu", "trainer.bf16"),
    *("trainer.tf32", "trainer.full_determinism", "trainer.ddp_backend", "trainer.ddp_timeout"),
)


def shared_values(config: Config) -> tuple:
    """The values of SHARED: equal for configs that can be trained together."""
    return tuple(value_of(config, setting) for setting in SHARED)


def check_together(configs: Mapping[str, Config]) -> None:
    """Refuse configs that can't be trained together. Raises ConfigError, which names the setting."""
    (first, one), *others = configs.items()
    outputs: dict[Path, str] = {}
    for name, config in configs.items():
        if config.adapter.method != "lora":
            raise ConfigError(
                f"{name}: adapter.method {config.adapter.method}: only LoRA can be trained together. Train this one alone."
            )
        for setting in ("train_modules", "train_tokens", "add_tokens"):
            if getattr(config.adapter, setting):
                raise ConfigError(
                    f"{name}: adapter.{setting} is not supported for several configs. Train this one alone."
                )
        if config.trainer.fsdp:
            raise ConfigError(f"{name}: trainer.fsdp is not supported for several configs. Train this one alone.")
        if other := [tracker for tracker in config.train.report_to if tracker != "tensorboard"]:
            raise ConfigError(
                f"{name}: train.report_to: {', '.join(other)} is not supported for several configs, as most trackers have one "
                "run per process. Leave it out, or train this one alone."
            )
        folder = Path(config.output).resolve()
        if folder in outputs:
            raise ConfigError(f"{name}: output {config.output} is that of {outputs[folder]} too. Give each its own.")
        outputs[folder] = name
    for name, config in others:
        for setting in SHARED:
            a, b = value_of(one, setting), value_of(config, setting)
            if a != b:
                raise ConfigError(
                    f"{setting}: {format_value(a)} in {first}, {format_value(b)} in {name}. Configs that are trained "
                    "together must have the same."
                )


def value_of(config: Config, setting: str) -> Any:
    """The value of a setting, such as "train.seed"."""
    section, name = setting.split(".")
    return getattr(getattr(config, section), name)
