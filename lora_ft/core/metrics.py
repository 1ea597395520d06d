"""The names of metrics: what each is called, and how the metrics of several eval sets are told apart. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

# Scores of the model's probabilities, of which a classification has all; and of texts that it writes.
SCORES = ("loss", "perplexity", "accuracy", "macro_f1")
TEXT_METRICS = ("bleu", "rouge_l", "exact_match")
TITLES = {
    **{"loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy", "macro_f1": "macro-F1"},
    **{"bleu": "BLEU", "rouge_l": "ROUGE-L", "exact_match": "exact match"},
}
CHOOSING = ("loss", "accuracy", "macro_f1", *TEXT_METRICS)  # what metric_for_best_model may be


def by_set(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one eval set under the names that the log and the record have: `loss`, or `dev_loss` of the set dev.

    These are the Trainer's own names, without its `eval_`. A single set that has no name is called "".
    """
    return {f"{name}_{key}" if name else key: value for key, value in metrics.items()}


def of_set(key: str, names: Iterable[str], metrics: Iterable[str] = CHOOSING) -> tuple[str, str] | None:
    """(set, metric) of a name such as `dev_loss` or `loss`, which is the first set's; None if it is neither's.

    No metric ends in `_` and another's name, so that a name has one meaning only.
    """
    names, metrics = list(names), list(metrics)
    if key in metrics:
        return names[0], key
    return next(((n, m) for n in names for m in metrics if n and key == f"{n}_{m}"), None)


def title(key: str) -> str | None:
    """What people call a metric: `macro-F1`, and `dev macro-F1` of the set dev; None for what is no single figure."""
    if key in TITLES:
        return TITLES[key]
    metric = next((m for m in TITLES if key.endswith(f"_{m}")), None)
    return f"{key.removesuffix(f'_{metric}')} {TITLES[metric]}" if metric else None
