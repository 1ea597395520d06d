"""Choosing between candidates: their runs are scored on rows held out of train, and the worse stop early.

Successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016): after a part of the steps, the better half goes on.
What a run scored is kept beside it, so that its checkpoints can go. Imports no torch.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from lora_ft.config.load import changes, parse_config
from lora_ft.config.schema import Config, eval_sets
from lora_ft.core.errors import ConfigError, FilesError
from lora_ft.core.metrics import TEXT_METRICS, metric_of, selection_metric
from lora_ft.core.storage import read_json, write_json

STAGES = (1 / 8, 1 / 4, 1 / 2)  # parts of the steps after which the worse half stops
TUNING_SET, TUNING_SHARE = "tuning", 0.1  # the eval set for tuning, and its share of train
MAX_TUNING_EXAMPLES = 500  # unless data.max_eval_examples is set
SCORES = "tuning.json"  # in a tuning run's folder: its config, and its score after each stage
NEVER = 2**31  # steps between evaluations; the last step is always evaluated

T = TypeVar("T")
Score = tuple[float, float] | None  # by the metric, and the loss; None: the run's numbers overflowed


def better_half(scores: Mapping[T, Score], metric: str, least: int = 1) -> list[T]:
    """The better half of candidates by their scores, best first, and `least` of them at least.

    Of an odd number the middle one stops too. Of equal scores the lower loss is the better, then the earlier candidate.
    """
    sign = 1 if metric_of(metric).lower_is_better else -1
    ranks = {candidate: (sign * score[0], score[1]) for candidate, score in scores.items() if score}
    return sorted(ranks, key=ranks.__getitem__)[: max(least, len(scores) // 2)]


def tuning_metric(config: Config) -> str:
    """The metric to tune by: metric_for_best_model, or the loss if that needs generated texts or there is no eval data."""
    selection = selection_metric(config.train.metric_for_best_model, list(eval_sets(config.data.eval)) or [""])
    metric = selection[1] if selection else "loss"
    return "loss" if metric in TEXT_METRICS else metric


def tuning_config(
    config: Config,
    output: Path,
    metric: str,
    *,
    share: float = TUNING_SHARE,
    most: float = math.inf,
    **train: object,
) -> Config:
    """The config of a run that is scored by `metric` on a share of train, at most `most` rows of it.

    That share is held out after the eval data's own. train: other settings of the run.
    """
    sets = eval_sets(config.data.eval)  # amounts of train to hold out, and sources
    if TUNING_SET in sets:
        raise ConfigError(f"data.eval.{TUNING_SET}: is what tuning holds out of train; give the eval set another name")
    held_out = {name or "eval": amount for name, amount in sets.items() if not isinstance(amount, tuple)}
    settings = {"evaluate_base": False, "predict_with_generate": False} | train
    settings["metric_for_best_model"] = f"{TUNING_SET}_{metric}"
    most = min(most, config.data.max_eval_examples or MAX_TUNING_EXAMPLES)
    data = {"eval": held_out | {TUNING_SET: share}, "max_eval_examples": int(most)}
    return without_selection(config, output, settings, data)


def without_selection(config: Config, output: Path, train: Mapping, data: Mapping | None = None) -> Config:
    """The config of a run that ends with its last step, the only one that is evaluated."""
    values = config.model_dump(mode="json") | {"output": str(output)}
    no_selection = {"load_best_model_at_end": False, "early_stopping_patience": None, "eval_steps": NEVER}
    values["train"] |= no_selection | {"save_total_limit": 1} | dict(train)
    values["data"] |= data or {}
    return parse_config(values)


def score_of(record: dict, metric: str) -> Score:
    """The score of a tuning run where it has stopped."""
    value, loss = (record["metrics"][f"{TUNING_SET}_{key}"] for key in (metric, "loss"))
    return value, loss


def kept_scores(config: Config) -> dict[float, Score]:
    """Stage -> the score that a run of this config had after it.

    Raises:
        FilesError: the file is damaged.
        ConfigError: the scores are those of other settings, which are listed.
    """
    path = Path(config.output) / SCORES
    if not path.is_file():
        return {}
    kept = read_json(path, FilesError)
    try:
        refuse_other_settings(path.parent, kept["config"], config)
        return {float(stage): score and (float(score[0]), float(score[1])) for stage, score in kept["scores"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise FilesError(f"{path}: damaged. Remove it to score that run again.") from e


def keep_score(config: Config, stage: float, score: Score) -> None:
    """Add the score after a stage to those of the run."""
    scores = kept_scores(config) | {stage: score}
    path = Path(config.output) / SCORES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"config": config.model_dump(mode="json"), "scores": {str(k): v for k, v in scores.items()}})


def refuse_other_settings(folder: Path, before: dict, config: Config) -> None:
    """Raise ConfigError if the run in a folder had settings that lead to another result; `before` is its config."""
    differences = changes(before, config)
    if lines := differences["result"] + differences["longer"]:
        settings = "".join(f"\n  {line}" for line in lines)
        way_out = "Set them back, or use another folder: compare --output DIR, train --set output=DIR."
        raise ConfigError(f"{folder}: holds a run with other settings:{settings}\n{way_out}")
