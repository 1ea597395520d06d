"""`train.learning_rate: auto`: which rates are tried, and by which runs. Imports no torch."""

import math
from collections.abc import Mapping
from pathlib import Path

from lora_ft.config.load import parse_config
from lora_ft.config.schema import Config
from lora_ft.config.tuning import tuning_config
from lora_ft.core.errors import ConfigError

AUTO = "auto"
FACTORS = (
    0.16,
    0.4,
    1,
    2.5,
    6.25,
)  # of the usual rate: five candidates, of which two go on after an eighth of the steps
FEWEST_STEPS = 32  # of a run: an eighth of less has hardly begun
MOST_WARMUP = 0.06  # of a run: else the first eighth would show the warmup more than the rate
TRIALS = "learning_rate"  # the folder of their runs in the output, and the record's entry
# How much more than LoRA's a method's rate is: full fine-tuning about a tenth (Schulman et al. 2025, LoRA Without Regret),
# prompts ten times and more (Lester et al. 2021, section 3.1), bottleneck layers the same (docs/claims.md)
METHOD_FACTORS = {"lora": 1.0, "full": 0.1, "bottleneck": 1.0, "prompt": 10.0}


def usual_rate(config: Config, width: int) -> float:
    """The rate in the middle of those that are tried, for a base with hidden states of `width` numbers.

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
    """The candidates, smallest first, with two digits."""
    return [float(f"{usual_rate(config, width) * factor:.1e}") for factor in FACTORS]


def trial_config(config: Config, rate: float) -> Config:
    """The config of the run that tries a rate: on nine tenths of train, scored by the loss on the rest, never on eval data."""
    output, warmup = Path(config.output) / TRIALS / f"{rate:g}", min(config.train.warmup_steps, MOST_WARMUP)
    return tuning_config(config, output, "loss", learning_rate=rate, warmup_steps=warmup, report_to=[])


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
