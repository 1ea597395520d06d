"""compare.html: the tables and charts of a comparison. Imports no torch."""

from functools import partial

from lora_ft.commands.compare.tables import cost_table, latency_tables, metric_keys, score_tables, seeds_note
from lora_ft.core.metrics import format_metric, metric_of
from lora_ft.report.charts import Chart, Line, chart, run_look
from lora_ft.report.comparison import Row, Section, Table, comparison_page
from lora_ft.report.figures import config_text

PAGE = "compare.html"
LATENCY_NOTE = "In parentheses: how many times the base's, measured in turns on one machine."


def page(result: dict) -> str:
    """The HTML of a comparison, from the content of compare.json, complete or not."""
    tables, latency, tuned = score_tables(result), latency_tables(result), list(result["tuned"])
    note = f"{seeds_note(result)}. The last step of each run counts: nothing was selected on the eval data."
    if tuned:
        steps = f", after {result['tune_steps']} steps" if result["tune_steps"] else ""
        note += (
            f" {', '.join(tuned)}: the best for each variant by {metric_of(result['tuning_metric']).title} on a tenth of the"
            f" training data, held out, with seed {result['seeds'][0]}{steps}."
        )
    trained = [v for v in result["variants"] if v.get("runs")]
    runs = [Row(v["name"], list(v["runs"].values())) for v in trained]
    return comparison_page(
        f"{len(result['variants'])} variants compared",
        [
            Section("Scores", tables, note=note[0].upper() + note[1:] if tables else "Nothing has been scored yet."),
            Section("Cost", [cost_table(result)]),
            Section("Inference latency", latency, note=LATENCY_NOTE if latency else ""),
            Section("Charts", charts=_charts(result)),
            Section("Tuning", [_tuning_table(result)] if tuned else []),
            Section("Runs", [Table([f"seed {seed}" for seed in result["seeds"]], runs, numbers=False)] if runs else []),
            Section("Config", text=config_text(result["config"])),
        ],
        "; ".join(f"{key}: {', '.join(values)}" for key, values in result["varied"].items()),
    )


def _tuning_table(result: dict) -> Table:
    """A row per point of the tuning grid of each variant, with its score and whether it was chosen."""
    key, rows = result["tuning_metric"], []
    for variant in result["variants"]:
        for tried in variant["tried"]:
            chosen = " (chosen)" if tried["settings"] == variant["tuned"] else ""
            settings = ", ".join(f"{name}={value}" for name, value in tried["settings"].items())
            score = "failed" if tried["score"] is None else format_metric(key, tried["score"])
            rows.append(Row(variant["name"], [settings + chosen, score]))
    return Table(["tried", f"{metric_of(key).title}, held out"], rows, numbers=False)


def _charts(result: dict) -> list[Chart]:
    """The ranking metric against numeric settings and costs, and against itself on the other eval sets."""
    (set_name, metric), variants = result["metric"], result["variants"]
    title, y_format = metric_of(metric).title, partial(format_metric, metric)
    charts = []

    def add(what: str, x_label: str, xs: list[float | None], y_set: str = set_name, **axis) -> None:
        lines = []
        for i, (variant, x) in enumerate(zip(variants, xs, strict=True)):
            if x is not None and (y := _score(variant, y_set, metric)):
                lines.append(Line(variant["name"], [(x, y["mean"])], run_look(i), dots=True))
                if "ci95" in y:
                    lines.append(Line("", [(x, end) for end in y["ci95"]], run_look(i)))
        charts.append(chart(what, lines, x_label, y_format=y_format, **axis))

    for key in result["varied"]:
        numbers = [_number(variant["settings"].get(key)) for variant in variants]
        if len({n for n in numbers if n is not None}) > 1:
            add(f"{title} by {key}", key, numbers, log_x=True)
    for key, what, unit, log_x in (
        ("trainable_parameters", "trained parameters", "trained parameters", True),
        ("peak_memory_mb", "peak memory", "MiB", False),
        ("seconds_per_step", "time per step", "seconds", False),
    ):
        add(f"{title} by {what}", unit, [variant.get(key) for variant in variants], log_x=log_x)
    token_ms = [(variant.get("latency") or {}).get("adapter", {}).get("token_ms") for variant in variants]
    add(f"{title} by latency of a new token", "ms", token_ms)
    own = [y["mean"] if (y := _score(variant, set_name, metric)) else None for variant in variants]
    for other in metric_keys(result):
        if other != set_name:
            label = f"{title} on {set_name}"
            add(f"{title} on {other} by {label}", label, own, other, x_format=y_format)
    return [c for c in charts if c]


def _score(variant: dict, set_name: str, metric: str) -> dict | None:
    return variant.get("metrics", {}).get(set_name, {}).get(metric)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
