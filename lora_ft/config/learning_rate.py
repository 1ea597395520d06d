"""`train.learning_rate: auto`: which rates are tried, by which runs, and what follows from their losses. Imports no torch."""

import math
from collections.abc import Mapping
from pathlib import Path

from lora_ft.config.load import parse_config
from lora_ft.config.schema import Config, eval_sets
from lora_ft.config.tuning import MAX_TUNING_EXAMPLES, TUNING_SET, tuning_config
from lora_ft.core.errors import ConfigError

AUTO = "auto"
# Five trials, of a fifth of the run's steps each, and scoring them take 1.4 times the run's tokens
PART = 1 / 5
SHARE = 0.08  # of the run's examples, that a trial is scored on
FACTORS = (0.16, 0.4, 1, 2.5, 6.25)  # the trials' rates are these times the usual one, raised for their length
FAR = 100  # times the least loss: from there on a trial has failed
FEWEST_STEPS = 6  # of a trial: fewer say little
# The best rate falls with this power of the run's length (Bjorck et al. 2024, Scaling Optimal LR Across Token Horizons)
HORIZON = 0.32
TRIALS = "learning_rate"  # the folder of their runs in the output, and the record's entry
# How much more than LoRA's a method's rate is: full fine-tuning about a tenth (Schulman et al. 2025, LoRA Without Regret),
# prompts ten times and more (Lester et al. 2021, section 3.1), bottleneck layers the same (docs/claims.md)
METHOD_FACTORS = {"lora": 1.0, "full": 0.1, "bottleneck": 1.0, "prompt": 10.0}


def usual_rate(config: Config, width: int) -> float:
    """The rate that is usual for the method, for a base with hidden states of `width` numbers.

    LoRA: 5e-4 (2000 / width)^0.78, a fit over Llamas of 1B to 70B with alpha 32 (the Tinker cookbook, hyperparam_utils.py);
    it does not depend on the rank, as alpha / rank scales the update. Another alpha acts like another rate: between B's first
    steps, where it multiplies the rate, and the later ones of both factors, where its square root does.
    """
    adapter = config.adapter
    rate = 5e-4 * (2000 / width) ** 0.78 * METHOD_FACTORS[adapter.method]
    if adapter.method == "lora":
        alpha = adapter.alpha * (math.sqrt(adapter.rank) if adapter.rslora else 1)
        rate *= math.sqrt(32 / alpha)
    return rate


def rates_to_try(config: Config, width: int) -> list[float]:
    """The rates of the trials, smallest first, with two digits: higher than the run's, as `best_rate` lowers them."""
    return [two_digits(usual_rate(config, width) * factor / PART**HORIZON) for factor in FACTORS]


def too_few(steps: int, rows: int) -> str:
    """What a run has too few of for trials: "rows", "steps" or ""."""
    return "rows" if rows < 2 else "steps" if steps * PART < FEWEST_STEPS else ""


def best_rate(losses: Mapping[float, float | None]) -> float:
    """The rate for the run, by the losses of the trials: of rate -> loss, or None if its numbers overflowed.

    It is where the cubic nearest to the losses is least, in the logarithm of the rate and the range of the trials; then lower,
    as the run is longer than they are. Losses after few steps on few rows are noisy, so all of them count, but one of twice the
    least counts half: far from the minimum they follow no cubic. A parabola is not enough, as losses rise faster above the best
    rate than below.
    """
    import numpy as np

    least = min(loss for loss in losses.values() if loss is not None)
    near = {rate: loss for rate, loss in losses.items() if loss is not None and loss <= FAR * least}
    x, y = np.log([*near]), np.array([*near.values()])
    weights = 1 / (1 + ((y - least) / (least or 1)) ** 2)
    curve = np.polynomial.Polynomial.fit(x, y, min(3, len(near) - 1), w=np.sqrt(weights))
    points = np.linspace(x.min(), x.max(), 1001)
    return two_digits(math.exp(points[np.argmin(curve(points))]) * PART**HORIZON)


def two_digits(rate: float) -> float:
    """The rate rounded to two digits."""
    return float(f"{rate:.1e}")


def trial_config(config: Config, rate: float) -> Config:
    """The config of the run that tries a rate: a short one with the whole schedule.

    It is scored by the loss on rows held out of train, never on eval data.
    """
    train, scheduler, rows = config.train, config.trainer.lr_scheduler_kwargs, config.data.max_train_examples
    examples = train.max_steps * train.batch_size if train.max_steps else train.num_train_epochs * (rows or math.inf)
    trial = tuning_config(
        config,
        Path(config.output) / TRIALS / f"{rate:g}",
        "loss",
        share=SHARE if train.max_steps else SHARE * min(1, train.num_train_epochs),
        most=min(MAX_TUNING_EXAMPLES, max(1, SHARE * examples)),
        learning_rate=rate,
        num_train_epochs=train.num_train_epochs * PART,
        max_steps=train.max_steps and shorter(train.max_steps),
        warmup_steps=shorter(train.warmup_steps),
        report_to=[],
    )
    settings: dict = {"eval_on_start": False}
    if scheduler:
        kwargs = {name: shorter(value) if name.endswith("_steps") else value for name, value in scheduler.items()}
        settings["lr_scheduler_kwargs"] = kwargs
    return trial.model_copy(update={"trainer": trial.trainer.model_copy(update=settings)})


def shorter(steps: float) -> float:
    """A number of steps of the run as that of a trial; below 1, a fraction of either, as it is."""
    return max(1, round(steps * PART)) if steps >= 1 else steps


def passes_of_trials(config: Config, steps: int, rows: int) -> tuple[float, float]:
    """What trials add to a run: the part of its steps that they have, and how often they score as much as all of its rows."""
    if config.train.learning_rate != AUTO or too_few(steps, rows):
        return 0, 0
    data = trial_config(config, 1).data
    share = eval_sets(data.eval)[TUNING_SET]
    assert isinstance(share, float) and data.max_eval_examples
    scored = min(share * rows, data.max_eval_examples)
    return len(FACTORS) * PART, len(FACTORS) * scored / rows


def with_rate(config: Config, rate: float) -> Config:
    """The config with this learning rate."""
    values = config.model_dump(mode="json")
    values["train"]["learning_rate"] = rate
    return parse_config(values)


def chosen_before(config: Config, record: Mapping) -> Config:
    """A config with `auto` as the run of `record` had it: with the rate that was chosen then.

    Raises:
        ConfigError: that run was given a rate.
    """
    if config.train.learning_rate != AUTO:
        return config
    rate = record["config"]["train"]["learning_rate"]
    if not record.get(TRIALS):
        raise ConfigError(
            f"train.learning_rate: auto, but the run in {config.output} was given {rate:g}. Set that, or start over with "
            "--overwrite."
        )
    return with_rate(config, rate)
