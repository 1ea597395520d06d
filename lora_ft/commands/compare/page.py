"""compare.html, from the content of compare.json. Imports no torch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lora_ft.commands.compare.display import (
    BASE_TITLE,
    base_tables,
    cost_table,
    latency_tables,
    metric_keys,
    result_winner,
    score_of,
    score_tables,
    skipped,
    tuning_table,
)
from lora_ft.core.metrics import format_metric, full_scale, metric_of
from lora_ft.report.charts import Chart, Line, chart, run_look
from lora_ft.report.comparison import Row, Section, Table, comparison_page
from lora_ft.report.figures import config_text
from lora_ft.report.scores import interval_bars


def page(result: dict) -> str:
    """The HTML of a comparison, finished or not."""
    scores, latency, tuned = score_tables(result, _mean_cell), latency_tables(result), list(result["tuned"])
    several = len(result["seeds"]) > 1
    of = (
        f"Means of {len(result['seeds'])} seeds; small: their 95% intervals" if several else "One seed, so no intervals"
    )
    note = f"{of}. The last step of each run counts: nothing was selected on the eval data."
    if tuned:
        steps = f" {result['tune_steps']}" if result["tune_steps"] else ""
        note += (
            f" {', '.join(tuned)}: the best for each variant by {metric_of(result['tuning_metric']).title} on a tenth of the"
            f" training data, held out, with seed {result['seeds'][0]}; after an eighth, a quarter and half of the{steps} steps"
            " the worse half stopped."
        )
    runs = [Row(variant["name"], list(variant["runs"].values())) for variant in result["variants"] if "runs" in variant]
    refused = "\n".join(f"{v['name']}: {skipped(v)}" for v in result["variants"] if skipped(v))
    columns = [f"seed {seed}" for seed in result["seeds"]]
    sections = [
        Section(
            "Scores",
            scores,
            note=note if scores else "Nothing has been scored yet.",
            notice=refused,
            bars=_bars(result),
        ),
        Section(BASE_TITLE.capitalize(), base_tables(result)),
        Section("Cost", [cost_table(result)]),
        Section("Inference latency", latency, note="In parentheses: how many times the base's." if latency else ""),
        Section("Charts", charts=_charts(result)),
        Section("Tuning", [tuning_table(result)] if tuned else []),
        Section("Runs", [Table(columns, runs, numbers=False)] if runs else []),
        Section("Config", text=config_text(result["config"])),
    ]
    varied = "; ".join(f"{key}: {', '.join(values)}" for key, values in result["varied"].items())
    return comparison_page(f"{len(result['variants'])} variants compared", result_winner(result), sections, varied)


def _charts(result: dict) -> list[Chart]:
    """The ranking metric against numeric settings and costs, and against itself on the other eval sets."""
    (set_name, metric), variants, charts = result["metric"], result["variants"], []
    title, y_format = metric_of(metric).title, partial(format_metric, metric)

    def add(what: str, x_label: str, xs: list[float | None], y_set: str = set_name, **axis) -> None:
        lines = []
        for i, (variant, x) in enumerate(zip(variants, xs, strict=True)):
            if x is not None and (y := score_of(variant, y_set, metric)):
                intervals = {x: _possible(metric, y["ci95"])} if "ci95" in y else {}
                lines.append(Line(variant["name"], [(x, y["mean"])], run_look(i), True, intervals, named=True))
        charts.append(chart(what, lines, x_label, y_format=y_format, full_scale=full_scale(metric), **axis))

    for key in result["varied"]:
        add(f"{title} by {key}", key, [_number(variant["settings"].get(key)) for variant in variants], log_x=True)
    parameters = [variant.get("trainable_parameters") for variant in variants]
    add(f"{title} by trained parameters", "trained parameters", parameters, log_x=True)
    add(f"{title} by peak memory", "MiB", [variant.get("peak_memory_mb") for variant in variants])
    add(f"{title} by time per step", "seconds", [variant.get("seconds_per_step") for variant in variants])
    latency = [variant.get("latency", {}).get("adapter", {}).get("token_ms") for variant in variants]
    add(f"{title} by latency of a new token", "ms", latency)
    own = [y["mean"] if (y := score_of(variant, set_name, metric)) else None for variant in variants]
    label = f"{title} on {set_name}"
    for other in [name for name in metric_keys(result) if name != set_name]:
        add(f"{title} on {other} by {label}", label, own, other, x_format=y_format)
    return [c for c in charts if c]


def _mean_cell(key: str, entry: dict | None) -> dict[str, str]:
    """A mean with its interval below, as in a run's report."""
    if entry is None:
        return {"value": "", "interval": ""}
    ends = _possible(key, entry["ci95"]) if "ci95" in entry else ()
    return {
        "value": format_metric(key, entry["mean"]),
        "interval": " to ".join(format_metric(key, end) for end in ends),
    }


def _possible(key: str, ends: Sequence[float]) -> list[float]:
    """An interval without what no such metric can be: few seeds give an accuracy above 100%, a loss below 0."""
    return [min(max(end, 0.0), full_scale(key) or end) for end in ends]


def _bars(result: dict) -> list[dict[str, Any]]:
    """The ranking metric of base and variants on one axis."""
    set_name, metric = result["metric"]
    base = result["base"].get(set_name, {}).get(metric)
    marks: list = [] if base is None else [("base", "base", base, None)]
    for i, variant in enumerate(result["variants"]):
        if of := score_of(variant, set_name, metric):
            marks.append(
                (variant["name"], run_look(i), of["mean"], _possible(metric, of["ci95"]) if "ci95" in of else None)
            )
    title = metric_of(f"{set_name}_{metric}" if set_name else metric).title
    return (
        [interval_bars(metric, title + (", 95% intervals" if len(result["seeds"]) > 1 else ""), marks)] if marks else []
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
