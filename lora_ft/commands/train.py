"""`lora-ft train`: one run, or the runs of several configs together on one base."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lora_ft.commands.learning_rate import check_run, record_to_resume, with_learning_rate
from lora_ft.commands.train_run import train_run
from lora_ft.config.learning_rate import AUTO
from lora_ft.config.schema import Config
from lora_ft.config.together import check_together
from lora_ft.core.errors import UserError
from lora_ft.core.messages import info, set_prefix, warn
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.distributed import processes
from lora_ft.distributed.environment import with_accelerate_settings
from lora_ft.report.write import COMPARISON, write_comparison
from lora_ft.training.together import Run, Together


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
        (config,) = with_accelerate_settings({"": config}).values()
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
        UserError, Stopped: of a run that failed or was stopped, after the others went on to their ends.
    """
    with processes.silence_other_ranks(), Stopper() as stopper:
        configs = with_accelerate_settings(configs)
        check_together(configs)
        choices = with_learning_rates(configs, stopper, resume=resume, overwrite=overwrite, trust=trust)
        together = Together(stopper, len(configs))
        options = {"resume": resume, "overwrite": overwrite, "until": until, "trust": trust}
        stories = [
            (name, partial(train_run, config, stopper, **options, facts=facts, together=together))  # type: ignore[arg-type]
            for name, (config, facts) in choices.items()
        ]
        shared = next(iter(configs.values())).train
        runs = together.train(stories, shared.micro_batch_tokens, shared.gradient_checkpointing)
        processes.destroy_process_group()
        raise_errors(runs)
        if until is None and processes.is_main():
            compare([Path(config.output) for config in configs.values()])


def with_learning_rates(
    configs: Mapping[str, Config], stopper: Stopper, *, resume: bool, overwrite: bool, trust: Trust
) -> dict[str, tuple[Config, dict]]:
    """`with_learning_rate` of each config; no rate is tried unless every run can begin, as far as its files and data say."""
    if any(config.train.learning_rate == AUTO for config in configs.values()):
        for name, config in configs.items():
            with named(name):
                if record_to_resume(config, resume):
                    continue
                check_run(config, resume=resume, overwrite=overwrite, trust=trust)
    chosen = {}
    for name, config in configs.items():
        with named(name):
            chosen[name] = with_learning_rate(config, stopper, resume=resume, overwrite=overwrite, trust=trust)
    return chosen


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say in messages and errors which config they are about."""
    set_prefix(f"{name}: ")
    try:
        yield
    except UserError as error:
        error.add_name(name)
        raise
    finally:
        set_prefix("")


def raise_errors(runs: Sequence[Run]) -> None:
    """Raise what ended one of the runs, if any has not come to its end.

    A stop comes first, as what it stopped can be resumed; then errors that are not the user's, such as bugs; then the highest
    exit code.
    """
    errors = {run.name: run.error for run in runs if run.error}
    if not errors:
        return
    failed = [name for name, error in errors.items() if not isinstance(error, Stopped)]
    summary = f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}"
    for name, error in errors.items():
        if isinstance(error, Stopped):
            info(f"{name}: {'. '.join(error.args)}")
            error.args = (f"{len(errors) - len(failed)} of {len(runs)} runs stopped",)
    if 0 < len(failed) < len(errors):
        info(summary)

    def urgency(error: BaseException) -> tuple[bool, bool, int]:
        return isinstance(error, Stopped), not isinstance(error, UserError), getattr(error, "exit_code", 0)

    error = max(errors.values(), key=urgency)
    if isinstance(error, UserError):
        error.args = (summary,)
    raise error


def compare(folders: Sequence[Path]) -> None:
    """Write a page that compares runs, beside the first. A failure is only a warning: the runs are there."""
    page = folders[0].parent / COMPARISON
    try:
        write_comparison(folders, page)
        info(f"compared in {page}")
    except UserError as e:
        warn(str(e))
