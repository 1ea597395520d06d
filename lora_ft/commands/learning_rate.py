"""`train.learning_rate: auto`: try rates in short runs, on rows held out of train, and train with the best.

The trials are ordinary runs in the output's folder learning_rate/, LoRA's trained together; what they scored is kept, so that a
stopped command goes on where it was.
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from lora_ft.commands.train_run import train_run
from lora_ft.config.learning_rate import (
    AUTO,
    PART,
    TRIALS,
    best_rate,
    chosen_before,
    rates_to_try,
    too_few,
    trial_config,
    two_digits,
    usual_rate,
    with_rate,
)
from lora_ft.config.schema import Config
from lora_ft.config.together import check_together
from lora_ft.config.tuning import SCORES, Score, keep_score, kept_scores, score_of
from lora_ft.core.errors import ConfigError, NumbersError
from lora_ft.core.messages import info, listed
from lora_ft.core.run_folder import checkpoints, newest_record
from lora_ft.core.signals import Stopper
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.batches import RowPacking
from lora_ft.distributed import processes
from lora_ft.model.device import prepare_device
from lora_ft.model.files import resolve
from lora_ft.model.load import load_model_config
from lora_ft.training.lock import locked
from lora_ft.training.output import remove_checkpoint
from lora_ft.training.resume import check_output
from lora_ft.training.setup import RunSetup
from lora_ft.training.together import Together

METRIC = "loss"
END = 1.0  # the stage of a score: a trial has one


def with_learning_rate(
    config: Config, stopper: Stopper, *, resume: bool = False, overwrite: bool = False, trust: Trust = NO_TRUST
) -> tuple[Config, dict]:
    """The config with a learning rate, and what the record says of the choice; of a config that has one, as it is.

    Raises:
        UserError: as `train_run`; NumbersError if the numbers overflow with each rate.
        Stopped: a signal came; resuming goes on with the trials.
    """
    if config.train.learning_rate != AUTO:
        return config, {}
    output = Path(config.output)
    if record := record_to_resume(config, resume):
        return chosen_before(config, record), {TRIALS: record[TRIALS]}
    setup = check_run(config, resume=resume, overwrite=overwrite, trust=trust)
    width = load_model_config(resolve(config.model.name, config.model.revision, trust)).get_text_config().hidden_size
    steps, rows = len(setup.make_plan(RowPacking(1), [])), setup.train_set.report.used
    if few := too_few(steps, rows):
        rate = two_digits(usual_rate(config, width))
        info(f"learning rate: {rate:g}, the usual one: the run has too few {few} to try others")
        return with_rate(config, rate), {TRIALS: {"tried": []}}
    rates = rates_to_try(config, width)
    trials = {rate: trial_config(config, rate) for rate in rates}
    info(f"learning rate: trying {listed([f'{rate:g}' for rate in rates])} in short runs, on rows held out of train")
    with locked(output) if processes.is_main() else nullcontext():
        if processes.is_main() and not resume:
            folders = [Path(trial.output) for trial in trials.values()]
            for folder in folders:
                check_output(folder, overwrite)
            for folder in folders:  # scores of a command that was stopped, maybe on other data
                (folder / SCORES).unlink(missing_ok=True)
        run_trials(trials, output, stopper, resume=resume, overwrite=overwrite, trust=trust)
        losses = {rate: score and score[0] for rate, score in scores_of(trials).items()}
        if not any(loss is not None for loss in losses.values()):
            raise NumbersError(
                f"train.learning_rate: auto: the numbers overflow with each of {listed([*map(str, rates)])}."
            )
        if processes.is_main():
            for trial in trials.values():
                for checkpoint in checkpoints(Path(trial.output)):
                    remove_checkpoint(checkpoint)
    best = best_rate(losses)
    info(f"learning rate: {best:g}, by the loss on held-out rows: {'; '.join(map(in_words, losses, losses.values()))}")
    return with_rate(config, best), {
        TRIALS: {"tried": [{"learning_rate": rate, "part": PART, METRIC: loss} for rate, loss in losses.items()]}
    }


def record_to_resume(config: Config, resume: bool) -> dict | None:
    """The record of the run in the output, if it has begun and is to be resumed."""
    connect(config)
    return processes.broadcast(lambda: newest_record(Path(config.output)) if resume else None)


def connect(config: Config) -> str:
    """Prepare the device, which is returned, and connect the processes."""
    device = prepare_device(config.trainer.use_cpu)
    processes.init_process_group(device, config.trainer.ddp_timeout, config.trainer.ddp_backend)
    return device


def check_run(config: Config, *, resume: bool, overwrite: bool, trust: Trust) -> RunSetup:
    """A run that can begin, as far as its output, files and data say; raises what they make training raise."""
    device = connect(config)
    if not resume:
        processes.broadcast(lambda: check_output(Path(config.output), overwrite))
    setup = RunSetup(config, device, trust)
    with processes.local_main_first():
        setup.read_files()
    return setup


def in_words(rate: float, loss: float | None) -> str:
    """`0.001 0.2345`."""
    return f"{rate:g} {'failed' if loss is None else f'{loss:.4f}'}"


def scores_of(trials: Mapping[float, Config]) -> dict[float, Score]:
    """What is kept of the scores of the trials that have ended, on every process."""
    kept = processes.broadcast(lambda: {rate: kept_scores(trial) for rate, trial in trials.items()})
    return {rate: scores[END] for rate, scores in kept.items() if END in scores}


def run_trials(
    trials: Mapping[float, Config], output: Path, stopper: Stopper, *, resume: bool, overwrite: bool, trust: Trust
) -> None:
    """Train each trial for the run of `output`, unless that is done, and keep its score."""
    known = scores_of(trials)
    waiting = {rate: trial for rate, trial in trials.items() if rate not in known}
    train = partial(train_run, stopper=stopper, resume=resume, overwrite=overwrite, trial_of=output, trust=trust)
    for rate, error in (train_together(waiting, stopper, train) or train_one_by_one(waiting, train)).items():
        if error and not isinstance(error, NumbersError):
            raise error
        if processes.is_main():
            record = None if error else newest_record(Path(waiting[rate].output))
            keep_score(waiting[rate], END, score_of(record, METRIC) if record else None)
    gc.collect()  # a Trainer and its callbacks refer to each other, and so keep the base


def train_together(
    trials: Mapping[float, Config], stopper: Stopper, train: Callable[..., None]
) -> dict[float, BaseException | None]:
    """Train the trials together; the error that ended each, if one did. {} if they, or runs on this base, can't be."""
    if not trials:
        return {}
    together = Together(stopper, len(trials))
    try:
        check_together({f"{rate:g}": trial for rate, trial in trials.items()})
        stories = [(f"{rate:g}", partial(train, trial, together=together)) for rate, trial in trials.items()]
        settings = next(iter(trials.values())).train
        runs = together.train(stories, settings.micro_batch_tokens, settings.gradient_checkpointing)
    except ConfigError:
        return {}
    return {rate: run.error for rate, run in zip(trials, runs, strict=True)}


def train_one_by_one(trials: Mapping[float, Config], train: Callable[..., None]) -> dict[float, BaseException | None]:
    """Train the trials one after the other; the error of each whose numbers overflowed."""
    ends: dict[float, BaseException | None] = dict.fromkeys(trials)
    for rate, trial in trials.items():
        gc.collect()  # what is left of the one before, as in `run_trials`
        try:
            train(trial)
        except NumbersError as error:
            info(f"{rate:g}: {error}")
            ends[rate] = error.with_traceback(None)
    return ends
