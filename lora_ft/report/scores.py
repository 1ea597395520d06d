"""A run's scores beside its base's, as text: values, intervals, differences, confusion tables."""

from typing import Any

from lora_ft.core.metrics import METRICS, add_set_name, format_metric, interval, metric_of, scalars
from lora_ft.report.runs import Run


def cell(name: str, metrics: dict) -> dict[str, str]:
    """A metric as written, and its interval."""
    value, ends = scalars(metrics).get(name), interval(name, metrics)
    between = f"{format_metric(name, ends[0])} to {format_metric(name, ends[1])}" if ends else ""
    return {"value": "" if value is None else format_metric(name, value), "interval": between}


def change(name: str, base: float | None, adapter: float | None) -> dict[str, str]:
    """Adapter less base, and whether that is better."""
    if base is None or adapter is None:
        return {"text": "", "verdict": ""}
    difference = adapter - base
    better = (difference < 0) == metric_of(name).lower_is_better
    text = f"{100 * difference:+.1f} points" if metric_of(name).format.endswith("%") else f"{difference:+.3g}"
    return {"text": text, "verdict": "same" if difference == 0 else "better" if better else "worse"}


def results(run: Run) -> list[dict[str, Any]]:
    """For each eval set: its name, a row a metric, bars for metrics with intervals, and the confusion tables."""
    sets = []
    for name in dict.fromkeys([*run.metrics, *run.base_metrics]):
        base, adapter = run.base_metrics.get(name, {}), run.metrics.get(name, {})
        metrics = list(dict.fromkeys([*scalars(adapter), *scalars(base)]))
        rows = [
            {
                "title": metric_of(m).title,
                "base": cell(m, base),
                "adapter": cell(m, adapter),
                "change": change(m, scalars(base).get(m), scalars(adapter).get(m)),
            }
            for m in metrics
        ]
        bars = [b for m in metrics if (b := bar(m, base, adapter))]
        confusions = [confusion(who, of, run) for who, of in (("base", base), ("adapter", adapter))]
        sets.append({"name": name, "rows": rows, "bars": bars, "confusions": [c for c in confusions if c]})
    return sets


def headline(run: Run) -> dict[str, str] | None:
    """The one figure to read first: what the run chose its best by, or accuracy; None without a base to set it against."""
    chosen = str((run.record["config"].get("train") or {}).get("metric_for_best_model"))
    for name in sorted(run.metrics, key=lambda name: chosen not in add_set_name(name, run.metrics[name])):
        base, adapter = (
            add_set_name(name, scalars(of)) | scalars(of) for of in (run.base_metrics.get(name, {}), run.metrics[name])
        )
        for metric in (chosen if not chosen.endswith("loss") else "", "accuracy", "loss"):
            if metric in base and metric in adapter:
                title = metric_of(f"{name}_{metric}" if name and metric in METRICS else metric).title
                values = {"base": base[metric], "adapter": adapter[metric]}
                texts = {who: format_metric(metric, value) for who, value in values.items()}
                return {"title": title[0].upper() + title[1:], **texts, **change(metric, **values)}
    return None


def bar(name: str, base: dict, adapter: dict) -> dict[str, Any] | None:
    """A metric's values and intervals on one scale, as shares of its length; None if the adapter's has no interval."""
    found = [(who, of, ends) for who, of in (("base", base), ("adapter", adapter)) if (ends := interval(name, of))]
    if not any(who == "adapter" for who, _, _ in found):
        return None
    low, high = min(ends[0] for *_, ends in found), max(ends[1] for *_, ends in found)
    margin = (high - low) * 0.08 or 0.01

    def at(value: float) -> float:
        return round((value - low + margin) / (high - low + 2 * margin), 4)

    marks = [
        {"who": who, "text": format_metric(name, of[name]), "low": at(e[0]), "at": at(of[name]), "high": at(e[1])}
        for who, of, e in found
    ]
    (_, _, first), (_, _, second) = found[0], found[-1]
    overlap = len(found) == 2 and first[1] >= second[0] and second[1] >= first[0]
    scale = [(at(low), format_metric(name, low)), (at(high), format_metric(name, high))]
    return {"title": metric_of(name).title, "marks": marks, "overlap": overlap, "ends": scale}


def confusion(who: str, metrics: dict, run: Run) -> dict[str, Any] | None:
    """The table and, for its shading, each cell's share of its row."""
    table = metrics.get("confusion")
    if not table:
        return None
    names: list[str] = next(iter((run.record["config"]["data"].get("label_names") or {}).values()), [])
    words = [names[i] if i < len(names) else str(i) for i in range(len(table))]
    rows = [
        {"word": word, "cells": [{"count": n, "share": round(n / max(1, sum(row)), 3)} for n in row]}
        for word, row in zip(words, table, strict=True)
    ]
    return {"who": who, "words": words, "rows": rows}
