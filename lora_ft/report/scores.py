"""A run's scores beside its base's, formatted: values, intervals, differences, confusion tables."""

from typing import Any

from lora_ft.core.metrics import (
    METRICS,
    add_set_name,
    format_difference,
    format_metric,
    interval,
    metric_of,
    scalars,
    verdict,
)
from lora_ft.report.runs import RunData


def metric_cell(key: str, metrics: dict) -> dict[str, str]:
    """A metric's value and its 95% interval; "" for what there is not."""
    value, ends = scalars(metrics).get(key), interval(key, metrics)
    return {
        "value": "" if value is None else format_metric(key, value),
        "interval": " to ".join(format_metric(key, end) for end in ends) if ends else "",
    }


def change(key: str, base: float | None, adapter: float | None, metrics: dict) -> dict[str, str]:
    """The difference adapter - base, with its interval if `metrics` has a comparison on the same rows; whether it is better."""
    if compared := format_difference(key, metrics):
        return {"text": compared, "verdict": verdict(key, metrics)}
    if base is None or adapter is None:
        return {"text": "", "verdict": ""}
    difference, metric = adapter - base, metric_of(key)
    better = (difference < 0) == metric.lower_is_better
    text = f"{100 * difference:+.1f} points" if metric.format.endswith("%") else f"{difference:+.3g}"
    return {"text": text, "verdict": "same" if difference == 0 else "better" if better else "worse"}


def score_tables(run: RunData) -> list[dict[str, Any]]:
    """Per eval set: its name, a row per metric, bars for metrics with intervals, and the confusion tables."""
    sets = []
    for name in dict.fromkeys([*run.metrics, *run.base_metrics]):
        base, adapter = run.base_metrics.get(name, {}), run.metrics.get(name, {})
        keys = list(dict.fromkeys([*scalars(adapter), *scalars(base)]))
        rows = [
            {
                "title": metric_of(key).title,
                "base": metric_cell(key, base),
                "adapter": metric_cell(key, adapter),
                "change": change(key, scalars(base).get(key), scalars(adapter).get(key), adapter),
            }
            for key in keys
        ]
        bars = [bar for key in keys if (bar := _interval_bar(key, base, adapter))]
        confusions = [_confusion_table(who, of, run) for who, of in (("base", base), ("adapter", adapter))]
        compared = any(format_difference(key, adapter) for key in keys)
        sets.append(
            {"name": name, "rows": rows, "bars": bars, "compared": compared, "confusions": [c for c in confusions if c]}
        )
    return sets


def headline(run: RunData) -> dict[str, str] | None:
    """The most important score: of the metric that selects the best step, else accuracy, else loss; None without a base.

    What chose does not judge: if another part of the training data was held out, it is that part's score.
    """
    selected_by = str((run.record["config"].get("train") or {}).get("metric_for_best_model"))
    sets = (run.record["config"].get("data") or {}).get("eval")
    chose = {name for name in run.metrics if selected_by in add_set_name(name, run.metrics[name])}
    held_out = {name for name, of in sets.items() if isinstance(of, int | float)} if isinstance(sets, dict) else set()
    for name in sorted(run.metrics, key=lambda name: (name not in held_out - chose, name not in chose)):
        both = scalars(run.base_metrics.get(name, {})), scalars(run.metrics[name])
        base, adapter = (add_set_name(name, values) | values for values in both)
        compared = add_set_name(name, run.metrics[name]) | run.metrics[name]
        for key in (selected_by if not selected_by.endswith("loss") else "", "accuracy", "loss"):
            if key in base and key in adapter:
                title = metric_of(f"{name}_{key}" if name and key in METRICS else key).title
                values = {"base": base[key], "adapter": adapter[key]}
                texts = {who: format_metric(key, value) for who, value in values.items()}
                return {"title": title[0].upper() + title[1:], **texts, **change(key, **values, metrics=compared)}
    return None


def _interval_bar(key: str, base: dict, adapter: dict) -> dict[str, Any] | None:
    """A metric's values and intervals on one scale from 0 to 1; None if the adapter has no interval."""
    both = (("base", base), ("adapter", adapter))
    of = {who: (metrics, ends) for who, metrics in both if (ends := interval(key, metrics))}
    if "adapter" not in of:
        return None
    low, high = min(ends[0] for _, ends in of.values()), max(ends[1] for _, ends in of.values())
    margin = (high - low) * 0.08 or 0.01

    def position(value: float) -> float:
        return round((value - low + margin) / (high - low + 2 * margin), 4)

    marks = [
        {"who": who, "low": position(ends[0]), "at": position(metrics[key]), "high": position(ends[1])}
        for who, (metrics, ends) in of.items()
    ]
    scale = [(position(end), format_metric(key, end)) for end in (low, high)]
    return {"title": metric_of(key).title, "marks": marks, "ends": scale}


def _confusion_table(who: str, metrics: dict, run: RunData) -> dict[str, Any] | None:
    """The counts with label words and, for shading, each cell's share of its row."""
    counts = metrics.get("confusion")
    if not counts:
        return None
    names: list[str] = next(iter((run.record["config"]["data"].get("label_names") or {}).values()), [])
    words = [names[i] if i < len(names) else str(i) for i in range(len(counts))]
    rows = [
        {"word": word, "cells": [{"count": n, "share": round(n / max(1, sum(row)), 3)} for n in row]}
        for word, row in zip(words, counts, strict=True)
    ]
    return {"who": who, "words": words, "rows": rows}
