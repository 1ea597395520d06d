"""`lora-ft train A.yaml B.yaml ...`: the runs of several configs, trained together on one base."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_ft.commands.train import train_run
from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError, UserError
from lora_ft.core.messages import format_value, info
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.distributed import processes
from lora_ft.training.together import Together

# What the runs have in common, because they share the base, the rows, or the process
SHARED = (
    *("model.name", "model.revision", "model.dtype", "train.micro_batch_tokens", "train.gradient_checkpointing"),
    *("trainer.use_cpu", "trainer.bf16", "trainer.tf32", "trainer.full_determinism"),
    *("trainer.ddp_backend", "trainer.ddp_timeout"),
)


def train_together(
    configs: Mapping[str, Config], *, resume: bool = False, overwrite: bool = False, trust: Trust = NO_TRUST
) -> None:
    """Train an adapter for each config, by its name, and leave it in its output, as if each was trained alone.

    Raises:
        ConfigError: the configs can't be trained together.
        UserError, Stopped: of the last run that failed or was stopped, after the others went on to their ends.
    """
    check_together(configs)
    options = {"resume": resume, "overwrite": overwrite, "trust": trust}
    with processes.silence_other_ranks(), Stopper() as stopper:
        together = Together(stopper)
        stories = [
            (name, partial(train_run, config, stopper, **options, together=together))  # type: ignore[arg-type]
            for name, config in configs.items()
        ]
        shared = next(iter(configs.values())).train
        runs = together.train(stories, shared.micro_batch_tokens, shared.gradient_checkpointing)
        processes.destroy_process_group()
        failed = [run for run in runs if run.error]
        for run in failed:
            if isinstance(run.error, Stopped):
                info(f"{run.name}: {'. '.join(run.error.args)}")
                run.error.args = (f"{len(failed)} of {len(runs)} runs stopped",)
            elif isinstance(run.error, UserError):
                run.error.args = (f"{len(failed)} of {len(runs)} runs failed: {', '.join(r.name for r in failed)}",)
        if failed:
            raise failed[-1].error  # type: ignore[misc]
        folders = " ".join(str(config.output) for config in configs.values())
        info(f"compare them: lora-ft report {folders}")


def check_together(configs: Mapping[str, Config]) -> None:
    """Refuse configs that can't be trained together. Raises ConfigError, which names the setting."""
    (first, one), *others = configs.items()
    outputs: dict[Path, str] = {}
    for name, config in configs.items():
        if config.adapter.method != "lora":
            raise ConfigError(
                f"{name}: adapter.method {config.adapter.method}: only LoRA can be trained together. Train it alone."
            )
        if config.trainer.fsdp:
            raise ConfigError(f"{name}: trainer.fsdp is not supported for several configs. Train it alone.")
        if "wandb" in config.train.report_to:
            raise ConfigError(
                f"{name}: train.report_to: wandb has one run per process. Leave it out, or train it alone."
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
                    "together have it in common."
                )


def value_of(config: Config, setting: str) -> Any:
    """The value of a setting, such as "train.seed"."""
    section, name = setting.split(".")
    return getattr(getattr(config, section), name)
