"""The metrics of an evaluation: titles, formats, which direction is better, and keys of several eval sets. Imports no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """title: for tables and charts. format: a format specification for its values."""

    title: str
    format: str
    lower_is_better: bool = False


METRICS = {
    "loss": Metric("loss", ".4f", lower_is_better=True),
    "perplexity": Metric("perplexity", "#,.4g", lower_is_better=True),
    "accuracy": Metric("accuracy", ".1%"),
    "macro_f1": Metric("macro-F1", ".4f"),
    "bleu": Metric("BLEU", ".2f"),
    "rouge_l": Metric("ROUGE-L", ".4f"),
    "exact_match": Metric("exact match", ".1%"),
}
VS_BASE = "_vs_base"  # ends the key of a metric's comparison with the base: {difference, ci95, ...}
TEXT_METRICS = ("bleu", "rouge_l", "exact_match")  # of generated texts; the others come from the model's probabilities
FULL_SCALE = {"accuracy": 1.0, "macro_f1": 1.0, "bleu": 100.0, "rouge_l": 1.0, "exact_match": 1.0}  # the largest values
SELECTION_METRICS = tuple(key for key in METRICS if key != "perplexity")  # the values of train.metric_for_best_model


def metric_of(key: str) -> Metric:
    """The metric with a key such as `macro_f1` or, of the eval set dev, `dev_macro_f1` (title: `dev macro-F1`).

    No metric's key ends in `_` and another's, so that a key has one meaning only.
    """
    if key in METRICS:
        return METRICS[key]
    for name, metric in METRICS.items():
        if key.endswith(f"_{name}"):
            return Metric(f"{key.removesuffix(f'_{name}')} {metric.title}", metric.format, metric.lower_is_better)
    return Metric(key.replace("_", " "), ".4g")


def full_scale(key: str) -> float | None:
    """The largest value that a metric can have; None for losses."""
    return next((most for name, most in FULL_SCALE.items() if key == name or key.endswith(f"_{name}")), None)


def format_metric(key: str, value: float) -> str:
    """A value as tables, charts and messages show it: `0.1553`, `85.4%`, a perplexity of `5.231` or `49,219`."""
    spec = metric_of(key).format
    return format(value, ",.0f" if spec.endswith("g") and 1000 <= abs(value) < 1e9 else spec)


def format_difference(key: str, metrics: Mapping[str, Any]) -> str:
    """How a metric differs from the base's, with its 95% interval: `+12.5 points (8.1 to 16.9)`; "" if not compared."""
    entry = metrics.get(f"{key}{VS_BASE}")
    if not isinstance(entry, dict):
        return ""
    values = [entry["difference"], *entry["ci95"]]
    if metric_of(key).format.endswith("%"):
        first, low, high = (f"{100 * value:+.1f}" for value in values)
        return f"{first} points ({low} to {high})"
    first, low, high = (f"{value:{'+' + metric_of(key).format}}" for value in values)
    return f"{first} ({low} to {high})"


def verdict(key: str, metrics: Mapping[str, Any]) -> str:
    """Whether it is "better" or "worse" than that of the base; "uncertain" if the difference may be 0, "" if not compared."""
    entry = metrics.get(f"{key}{VS_BASE}")
    if not isinstance(entry, dict):
        return ""
    low, high = entry["ci95"]
    if low <= 0 <= high:
        return "uncertain"
    return "better" if (high < 0) == metric_of(key).lower_is_better else "worse"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Metrics on one line, for messages: `loss 0.1553, accuracy 85.4%`. Intervals and tables are left out."""
    return ", ".join(f"{key} {format_metric(key, value)}" for key, value in scalars(metrics).items())


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are single numbers: without intervals and confusion tables."""
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def interval(key: str, metrics: Mapping[str, Any]) -> list[float] | None:
    """The ends of a metric's 95% interval, if it was computed."""
    return metrics.get(f"{key}_ci95")


def is_number(value: object) -> bool:
    """Whether a value is a number to compute with: not NaN, infinite, or of a size that only damage explains."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e100


def _well_formed(key: str, value: Any) -> bool:
    """Whether an entry of metrics is what its key says."""

    def is_pair(ends: object) -> bool:
        return isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))

    if key.endswith("_ci95"):
        return is_pair(value)
    if key.endswith(VS_BASE):
        counts = ("p", "better", "worse") if isinstance(value, dict) and "p" in value else ()
        numbers = ("difference", *counts)
        return isinstance(value, dict) and is_pair(value.get("ci95")) and all(is_number(value.get(n)) for n in numbers)
    if key.endswith("confusion"):
        rows: list[Any] = value if isinstance(value, list) and value else [None]
        lists = all(isinstance(row, list) and len(row) == len(rows) for row in rows)
        return lists and all(isinstance(n, int) and is_number(n) and n >= 0 for row in rows for n in row)
    return is_number(value) or (key.endswith("rows") and isinstance(value, dict))


def add_set_name(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an eval set under the Trainer's keys without `eval_`: `dev_loss` of the set dev, `loss` of the set ""."""
    return {f"{name}_{key}" if name else key: value for key, value in metrics.items()}


def split_set_name(metrics: object, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The inverse of `add_set_name`: eval set -> its metrics, given the names of all sets; without damaged entries."""
    sets: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items() if isinstance(metrics, dict) else ():
        if not _well_formed(key, value):
            continue
        name = max((n for n in names if key.startswith(f"{n}_")), key=len, default="")
        sets.setdefault(name, {})[key.removeprefix(f"{name}_") if name else key] = value
    return sets


def loss_beside(key: str) -> str:
    """The key of the loss of the same eval set: `dev_loss` for `dev_accuracy`."""
    metric = max((name for name in METRICS if key == name or key.endswith(f"_{name}")), key=len)
    return key.removesuffix(metric) + "loss"


def selection_metric(key: str, names: Collection[str]) -> tuple[str, str] | None:
    """(eval set, metric) of train.metric_for_best_model: `loss` is the first set's; None if there is no such metric."""
    if key in SELECTION_METRICS:
        return next(iter(names)), key
    return next(((n, m) for n in names for m in SELECTION_METRICS if n and key == f"{n}_{m}"), None)
