"""`lora-ft train`: one run, or the runs of several configs together on one base."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lora_ft.commands.learning_rate import with_learning_rate
from lora_ft.commands.train_run import train_run
from lora_ft.config.schema import Config
from lora_ft.config.together import check_together
from lora_ft.core.errors import UserError
from lora_ft.core.messages import info, warn
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.distributed import processes
from lora_ft.report.write import COMPARISON, write_comparison
from lora_ft.training.together import Together


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    until: float | None = None,
    trust: Trust = NO_TRUST,
) -> None:
    """Train an adapter and leave it in `config.output`. Arguments and errors as of `train_run`."""
    with processes.silence_other_ranks(), Stopper() as stopper:
        config, facts = with_learning_rate(config, stopper, resume=resume, overwrite=overwrite, trust=trust)
        train_run(config, stopper, resume=resume, overwrite=overwrite, until=until, trust=trust, facts=facts)
        processes.destroy_process_group()


def train_together(
    configs: Mapping[str, Config],
    *,
    resume: bool = False,
    overwrite: bool = False,
    until: float | None = None,
    trust: Trust = NO_TRUST,
) -> None:
    """Train an adapter for each config, by its name, and leave it in its output, as if each was trained alone.

    Arguments as of `train_run`.

    Raises:
        ConfigError: the configs can't be trained together.
        UserError, Stopped: of the last run that failed or was stopped, after the others went on to their ends.
    """
    check_together(configs)
    options = {"resume": resume, "overwrite": overwrite, "until": until, "trust": trust}
    with processes.silence_other_ranks(), Stopper() as stopper:
        choices = {
            name: with_learning_rate(config, stopper, resume=resume, overwrite=overwrite, trust=trust)
            for name, config in configs.items()
        }
        together = Together(stopper, len(configs))
        stories = [
            (name, partial(train_run, config, stopper, **options, facts=facts, together=together))  # type: ignore[arg-type]
            for name, (config, facts) in choices.items()
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
        if until is None and processes.is_main():
            compare([Path(config.output) for config in configs.values()])


def compare(folders: Sequence[Path]) -> None:
    """Write a page that compares runs, beside the first. A failure is only a warning: the runs are there."""
    page = folders[0].parent / COMPARISON
    try:
        write_comparison(folders, page)
        info(f"compared in {page}")
    except UserError as e:
        warn(str(e))
