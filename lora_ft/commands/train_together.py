"""`lora-ft train A.yaml B.yaml ...`: the runs of several configs, trained together on one base."""

from collections.abc import Mapping
from functools import partial

from lora_ft.commands.train import train_run
from lora_ft.config.schema import Config
from lora_ft.config.together import check_together
from lora_ft.core.errors import UserError
from lora_ft.core.messages import info
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.distributed import processes
from lora_ft.training.together import Together


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
        together = Together(stopper, len(configs))
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
