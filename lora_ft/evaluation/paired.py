"""Two models that answered the same rows: the difference of each metric, with its 95% interval.

`Rows` hold per metric what each row contributes to it, as an array (rows, numbers): a value, or a value and its weight, unless
the metric has its own function of rows. The arrays of two models are in the same order, so that what makes a row easy or hard
for both cancels out of the difference. Draws no number of the global generators.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_ft.core.intervals import mcnemar_p, newcombe_interval, student_t
from lora_ft.core.metrics import VS_BASE

Rows = dict[str, np.ndarray]
RESAMPLES = 1000


def compare_rows(
    base: Rows, own: Rows, values: Mapping[str, Callable[[np.ndarray], float]]
) -> dict[str, dict[str, Any]]:
    """Metric's key + VS_BASE -> {difference: own - base, ci95: its ends} of the metrics that both have.

    Shares of right rows also have how many rows are `better` and `worse`, and `p` of McNemar's test. values: the
    functions of those metrics that are no mean of their rows; these rows are resampled in pairs (Efron 1979).
    """
    found: dict[str, dict[str, Any]] = {}
    for key in [key for key in own if key in base]:
        of_base, of_own = base[key], own[key]
        if of_base.shape != of_own.shape:
            continue  # not the same rows
        if key in values:
            entry = _resampled(of_base, of_own, values[key])
        elif of_own.shape[1] == 1 and np.isin([of_base, of_own], (0, 1)).all():
            entry = _shares(of_base[:, 0], of_own[:, 0])
        else:
            entry = _means(of_base, of_own)
        if entry:
            found[key + VS_BASE] = entry
    return found


def _shares(base: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    better, worse, both = (int(rows.sum()) for rows in (own > base, own < base, (own == 1) & (base == 1)))
    ends = newcombe_interval(both, better, worse, len(own) - both - better - worse)
    difference = (better - worse) / len(own)
    return {
        "difference": difference,
        "ci95": list(ends),
        "better": better,
        "worse": worse,
        "p": mcnemar_p(better, worse),
    }


def _means(base: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """Student's interval of the rows' differences; where rows weigh differently, of the ratio (Cochran 1977, 2.11)."""
    n, weights = len(own), own[:, 1] if own.shape[1] > 1 else np.ones(len(own))
    if n < 2 or (own.shape[1] > 1 and not np.array_equal(base[:, 1], own[:, 1])):
        return {}
    differences = own[:, 0] - base[:, 0]
    difference = differences.sum() / weights.sum()
    spread = np.sqrt(n / (n - 1) * ((differences - difference * weights) ** 2).sum()) / weights.sum()
    half = student_t(n - 1) * spread
    return {"difference": float(difference), "ci95": [float(difference - half), float(difference + half)]}


def _resampled(base: np.ndarray, own: np.ndarray, value: Callable[[np.ndarray], float]) -> dict[str, Any]:
    n, generator, differences = len(own), np.random.default_rng(0), []
    if n < 2:
        return {}
    for _ in range(RESAMPLES):
        drawn = generator.integers(n, size=n)
        differences.append(value(own[drawn]) - value(base[drawn]))
    ends = np.quantile(differences, [0.025, 0.975])
    return {"difference": value(own) - value(base), "ci95": [float(end) for end in ends]}
