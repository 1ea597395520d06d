"""A run's scores beside its base's, formatted: values, intervals, differences, confusion tables."""

from collections.abc import Sequence
from typing import Any

from lora_ft.core.metrics import (
    VS_BASE,
    add_set_name,
    format_difference,
    format_metric,
    full_scale,
    interval,
    loss_beside,
    metric_of,
    scalars,
    verdict,
)
from lora_ft.report.charts import ticks, without_zeros, y_range
from lora_ft.report.confusion import confusion_tables, shortened
from lora_ft.report.labels import MAX_NAME
from lora_ft.report.runs import RunData, eval_examples

Mark = tuple[str, str, float, Sequence[float] | None]  # name, look, value, interval


def metric_cell(key: str, metrics: dict) -> dict[str, str]:
    """A metric's value and its 95% interval; "" for what there is not."""
    value, ends = scalars(metrics).get(key), interval(key, metrics)
    return {
        "value": "" if value is None else format_metric(key, value),
        "interval": " to ".join(format_metric(key, end) for end in ends) if ends else "",
    }


def change(key: str, base: float | None, adapter: float | None, metrics: dict) -> dict[str, str]:
    """The difference adapter - base; with its interval, and whether it is better, if `metrics` compares the same rows.

    Perplexity, exp(loss), has the verdict of the loss.
    """
    if compared := format_difference(key, metrics):
        value, _, ends = compared.partition(" (")
        return {"text": value, "interval": ends.removesuffix(")"), "verdict": verdict(key, metrics)}
    if base is None or adapter is None:
        return {"text": "", "interval": "", "verdict": ""}
    as_compared = {f"{key}{VS_BASE}": {"difference": adapter - base, "ci95": [0.0, 0.0]}}
    sure = verdict(loss_beside(key), metrics) if key.endswith("perplexity") else ""
    return {"text": format_difference(key, as_compared).partition(" (")[0], "interval": "", "verdict": sure}


def is_loss(key: str) -> bool:
    """Whether a metric comes after those that a person understands."""
    return key.endswith(("loss", "perplexity"))


def score_tables(run: RunData) -> list[dict[str, Any]]:
    """Per eval set: its name, a row per metric, bars for metrics with intervals, the confusion tables, and telling rows."""
    sets = []
    for name in dict.fromkeys([*run.metrics, *run.base_metrics]):
        base, adapter = run.base_metrics.get(name, {}), run.metrics.get(name, {})
        keys = list(dict.fromkeys([*scalars(adapter), *scalars(base)]))
        keys.sort(key=is_loss)
        rows = [
            {
                "title": metric_of(key).title,
                "base": metric_cell(key, base),
                "adapter": metric_cell(key, adapter),
                "change": change(key, scalars(base).get(key), scalars(adapter).get(key), adapter),
            }
            for key in keys
        ]
        both = (("base", "base", base), ("adapter", "eval", adapter))
        bars = [
            interval_bars(key, f"{metric_of(key).title} with 95% intervals", marks)
            for key in keys
            if interval(key, adapter)
            and (marks := [(who, look, of[key], interval(key, of)) for who, look, of in both if key in scalars(of)])
        ]
        compared = any(format_difference(key, adapter) for key in keys)
        told = [_shown_rows(found) for found in run.rows if found.get("set") == name and found.get("rows")]
        examples = eval_examples(run.record, name)
        sets.append(
            {"name": name, "examples": examples, "rows": rows, "bars": bars, "compared": compared, "told": told}
            | {"confusion": confusion_tables(run, name)}
        )
    return sets


KINDS = {
    "fixed": "Fixed: only the adapter is right",
    "broken": "Broken: only the base is right",
    "both wrong": "Wrong with both",
    "wrong": "Wrong with the adapter",
}


def _shown_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Rows of one kind from samples.json: a title, how many there are, and per row its texts."""
    rows = [
        {"where": str(row.get("where", "")), "prompt": str(row.get("prompt", ""))}
        | {who: shortened(str(row[who])) if who in row else "" for who in ("label", "base", "adapter")}
        for row in (found["rows"] if isinstance(found["rows"], list) else [])
        if isinstance(row, dict)
    ]
    count = found["count"] if isinstance(found.get("count"), int) else len(rows)
    return {"title": KINDS.get(str(found.get("kind")), ""), "count": count, "rows": rows}


def headline(run: RunData) -> dict[str, str]:
    """What was gained, in a `sentence`, and in `detail` how sure that is; `verdict`: better, worse, or anything else."""
    if found := main_metric(run):
        name, key = found
        title = metric_of(f"{name}_{key}" if name else key).title
        own = run.metrics[name]
        return _in_words(key, title, run.base_metrics.get(name, {}), own, eval_examples(run.record, name))
    detail = "Without scores on eval data, it is unknown what was gained."
    return {"sentence": "Not evaluated.", "detail": detail, "verdict": ""}


def main_metric(run: RunData) -> tuple[str, str] | None:
    """(eval set, metric) that a run is judged by: the metric that selects the best step, else accuracy, else loss.

    What chose does not judge: if another part of the training data was held out, it is that part's score.
    """
    selected_by = str((run.record["config"].get("train") or {}).get("metric_for_best_model"))
    sets = (run.record["config"].get("data") or {}).get("eval")
    chose = {name for name in run.metrics if selected_by in add_set_name(name, run.metrics[name])}
    held_out = {name for name, of in sets.items() if isinstance(of, int | float)} if isinstance(sets, dict) else set()
    for name in sorted(run.metrics, key=lambda name: (name not in held_out - chose, name not in chose)):
        base, own = run.base_metrics.get(name, {}), run.metrics[name]
        chosen = selected_by.removeprefix(f"{name}_") if name else selected_by
        for key in (chosen if not chosen.endswith("loss") else "", "accuracy", "loss"):
            if key in scalars(own) and (key in scalars(base) or not base):
                return name, key
    return None


def _in_words(key: str, title: str, base: dict, own: dict, examples: int) -> dict[str, str]:
    cell, rows = metric_cell(key, own), f"{examples:,} eval examples" if examples else "the eval data"
    if key not in base:
        interval_of = f" (95% interval {cell['interval']})" if cell["interval"] else ""
        sentence = f"{_capital(title)} is {cell['value']}{interval_of} on {rows}."
        return {"sentence": sentence, "detail": "The base was not scored: what was gained is unknown.", "verdict": ""}
    from_to = f"from {format_metric(key, base[key])} to {cell['value']}"
    difference, sure = own[key] - base[key], verdict(key, own)
    moved = "rose" if difference > 0 else "fell"
    if not difference:
        sentence = f"Nothing gained: {title} stayed at {cell['value']}."
    elif not sure:
        sentence = f"{_capital(title)} {moved} {from_to}."
    elif sure == "uncertain":
        sentence = f"No certain change: {title} {moved} {from_to}, which may be chance."
    else:
        sentence = f"{_capital(title)} {moved} {from_to}: {sure} than the base."
    entry = own.get(f"{key}{VS_BASE}") or {}
    if not sure:
        detail = f"Measured on {rows}, but not compared row by row: how sure this is, is unknown."
        return {"sentence": sentence, "detail": detail, "verdict": ""}
    moved_by = change(key, None, None, own)
    detail = f"{moved_by['text']} on {rows} (95% interval {moved_by['interval']})"
    if "p" in entry:
        p = f"p = {entry['p']:.2g}" if entry["p"] >= 0.0001 else "p < 0.0001"
        borderline = ", so that this is borderline" if entry["p"] >= 0.05 and sure != "uncertain" else ""
        detail += f": rows fixed {entry['better']:,}, broken {entry['worse']:,} (McNemar's exact test: {p}{borderline})"
    detail += "."
    both = "loss" in base and "loss" in own
    if sure == "uncertain" and both and (of_loss := verdict("loss", own)) in ("better", "worse"):
        before, after = (format_metric("loss", of["loss"]) for of in (base, own))
        detail += f" The loss went from {before} to {after}: {of_loss}."
    return {"sentence": sentence, "detail": detail, "verdict": sure}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def interval_bars(key: str, title: str, marks: Sequence[Mark]) -> dict[str, Any]:
    """The values and intervals of a metric as positions from 0 to 1 on one axis."""
    values = [value for _, _, value, ends in marks for value in (value, *(ends or ()))]
    low, high = y_range(min(values), max(values), full_scale(key))

    def position(value: float) -> float:
        return round((value - low) / (high - low), 4)

    names = [shortened(who, MAX_NAME) for who, *_ in marks]
    drawn = [
        {"who": name, "look": look, "at": position(value), "ends": [position(end) for end in ends or ()]}
        for name, (_, look, value, ends) in zip(names, marks, strict=True)
    ]
    scale = [(position(value), without_zeros(format_metric(key, value))) for value in ticks(low, high)]
    return {"title": title, "marks": drawn, "ticks": scale, "left": 16 + 7 * max(map(len, names))}
