"""A comparison in the terminal and as compare.html, both from the content of compare.json. Imports no torch."""

from functools import partial

from rich import table as rich_table
from rich.console import Console

from lora_ft.core.messages import printable
from lora_ft.core.metrics import format_difference, format_metric, metric_of, verdict
from lora_ft.report.charts import Chart, Line, chart, run_look
from lora_ft.report.comparison import Row, Section, Table, comparison_page
from lora_ft.report.figures import config_text

COSTS = {  # key -> (title, format)
    "trainable_parameters": ("trained", "{:,}".format),
    "trainable_share": ("share", "{:.3%}".format),
    "bytes_on_disk": ("disk, MiB", lambda size: f"{size / 2**20:,.2f}"),
    "peak_memory_mb": ("peak, MiB", "{:,.0f}".format),
    "seconds_per_step": ("s/step", "{:.3f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
}


BASE_TITLE = "first seed against the base, row by row"


def show(result: dict) -> None:
    """Print the tables on stdout, and which variants were skipped."""
    console = Console(highlight=False, markup=False, emoji=False)
    scores = [(f"{t.title}: {_seeds(result)}" if t.title else _seeds(result), t) for t in score_tables(result)]
    latency = [("latency (times the base's)", table) for table in latency_tables(result)]
    against = [(f"{BASE_TITLE}{f', {t.title}' if t.title else ''}", t) for t in base_tables(result)]
    for title, table in [*scores, *against, ("cost", cost_table(result)), *latency]:
        printed = rich_table.Table(title=title)
        printed.add_column("", overflow="fold", no_wrap=all(len(row.name) <= 16 for row in table.rows))
        for i, column in enumerate(table.columns):
            longest = max((len(str(row.cells[i])) for row in table.rows), default=0)
            printed.add_column(column, justify="right", overflow="fold", no_wrap=longest >= len(column))
        for row in table.rows:
            printed.add_row(printable(row.name), *(printable(str(cell)) for cell in row.cells))
        console.print(printed)
    for variant in result["variants"]:
        if reason := _skipped(variant):
            console.print(f"{printable(variant['name'])}: {printable(reason, 500)}", soft_wrap=True)


def page(result: dict) -> str:
    """The HTML of a comparison, finished or not."""
    scores, latency, tuned = score_tables(result), latency_tables(result), list(result["tuned"])
    note = f"Scores: {_seeds(result)}. The last step of each run counts: nothing was selected on the eval data."
    if tuned:
        steps = f", after {result['tune_steps']} steps" if result["tune_steps"] else ""
        note += (
            f" {', '.join(tuned)}: the best for each variant by {metric_of(result['tuning_metric']).title} on a tenth of the"
            f" training data, held out, with seed {result['seeds'][0]}{steps}."
        )
    runs = [Row(variant["name"], list(variant["runs"].values())) for variant in result["variants"] if "runs" in variant]
    seeds = [f"seed {seed}" for seed in result["seeds"]]
    sections = [
        Section("Scores", scores, note=note if scores else "Nothing has been scored yet."),
        Section(BASE_TITLE.capitalize(), base_tables(result)),
        Section("Cost", [cost_table(result)]),
        Section("Inference latency", latency, note="In parentheses: how many times the base's." if latency else ""),
        Section("Charts", charts=_charts(result)),
        Section("Tuning", [_tuning_table(result)] if tuned else []),
        Section("Runs", [Table(seeds, runs, numbers=False)] if runs else []),
        Section("Config", text=config_text(result["config"])),
    ]
    varied = "; ".join(f"{key}: {', '.join(values)}" for key, values in result["varied"].items())
    return comparison_page(f"{len(result['variants'])} variants compared", sections, varied)


def score_tables(result: dict) -> list[Table]:
    """A table per eval set: base and variants, the settings that were tuned, and the metrics' means."""
    tables, tuned = [], list(result["tuned"])
    for name, keys in _metric_keys(result).items():
        rows = []
        if base := result["base"].get(name):
            scores = [format_metric(key, base[key]) if key in base else "" for key in keys]
            rows.append(Row("base", [*("" for _ in tuned), *scores], "base"))
        for i, variant in enumerate(result["variants"]):
            scores = [format_mean(key, _score(variant, name, key)) for key in keys]
            cells = [variant["tuned"].get(key, "") for key in tuned] + scores
            rows.append(Row(variant["name"], cells, run_look(i), _skipped(variant)))
        columns = [key.rpartition(".")[2] for key in tuned] + [metric_of(key).title for key in keys]
        tables.append(Table(columns, rows, name))
    return tables


def base_tables(result: dict) -> list[Table]:
    """A table per eval set: how each variant's first run differs from the base in the ranking metric, with its interval."""
    metric, tables = result["metric"][1], []
    for name in _metric_keys(result):
        rows = []
        for i, variant in enumerate(result["variants"]):
            of = variant.get("vs_base", {}).get(name, {})
            if compared := format_difference(metric, of):
                rows.append(Row(variant["name"], [f"{compared}, {verdict(metric, of)}"], run_look(i)))
        if rows:
            tables.append(Table([f"{metric_of(metric).title}: difference (95% interval)"], rows, name))
    return tables


def cost_table(result: dict) -> Table:
    """Parameters, bytes, memory and speed of the variants."""
    rows = []
    for i, variant in enumerate(result["variants"]):
        cells = [as_text(variant[key]) if key in variant else "" for key, (_, as_text) in COSTS.items()]
        rows.append(Row(variant["name"], cells, run_look(i)))
    return Table([title for title, _ in COSTS.values()], rows)


def latency_tables(result: dict) -> list[Table]:
    """Latency of a prompt and of a new token, as adapter and merged; [] unless benchmarks/latency.py has measured it."""
    rows, tokens = [], 0
    for variant in result["variants"]:
        latency = variant.get("latency", {})
        for form, suffix in (("adapter", ""), ("merged", ", merged")):
            if of := latency.get(form):
                tokens = latency["prompt_tokens"]
                cells = [f"{of[f'{part}_ms']:.1f} ({of[f'{part}_ratio']:.3f}x)" for part in ("prompt", "token")]
                rows.append(Row(variant["name"] + suffix, cells))
    return [Table([f"prompt of {tokens} tokens, ms", "new token, ms"], rows)] if rows else []


def format_mean(key: str, entry: dict | None) -> str:
    """A mean with half its interval, `86.2% ± 1.1`; "" for None."""
    if entry is None:
        return ""
    mean = format_metric(key, entry["mean"])
    if "ci95" not in entry:
        return mean
    half = entry["ci95"][1] - entry["mean"]
    return f"{mean} ± {100 * half:.1f}" if mean.endswith("%") else f"{mean} ± {half:.2g}"


def _tuning_table(result: dict) -> Table:
    """A row per variant and point of the tuning grid."""
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
    (set_name, metric), variants, charts = result["metric"], result["variants"], []
    title, y_format = metric_of(metric).title, partial(format_metric, metric)

    def add(what: str, x_label: str, xs: list[float | None], y_set: str = set_name, **axis) -> None:
        lines = []
        for i, (variant, x) in enumerate(zip(variants, xs, strict=True)):
            if x is not None and (y := _score(variant, y_set, metric)):
                lines.append(Line(variant["name"], [(x, y["mean"])], run_look(i), dots=True))
                lines.append(Line("", [(x, end) for end in y.get("ci95", ())], run_look(i)))
        charts.append(chart(what, lines, x_label, y_format=y_format, **axis))

    for key in result["varied"]:
        add(f"{title} by {key}", key, [_number(variant["settings"].get(key)) for variant in variants], log_x=True)
    parameters = [variant.get("trainable_parameters") for variant in variants]
    add(f"{title} by trained parameters", "trained parameters", parameters, log_x=True)
    add(f"{title} by peak memory", "MiB", [variant.get("peak_memory_mb") for variant in variants])
    add(f"{title} by time per step", "seconds", [variant.get("seconds_per_step") for variant in variants])
    latency = [variant.get("latency", {}).get("adapter", {}).get("token_ms") for variant in variants]
    add(f"{title} by latency of a new token", "ms", latency)
    own = [y["mean"] if (y := _score(variant, set_name, metric)) else None for variant in variants]
    label = f"{title} on {set_name}"
    for other in [name for name in _metric_keys(result) if name != set_name]:
        add(f"{title} on {other} by {label}", label, own, other, x_format=y_format)
    return [c for c in charts if c]


def _metric_keys(result: dict) -> dict[str, list[str]]:
    """Eval set -> the metrics of any variant, without perplexity, which shows nothing that the loss does not."""
    keys: dict[str, dict[str, None]] = {}
    for variant in result["variants"]:
        for name, metrics in variant.get("metrics", {}).items():
            keys.setdefault(name, {}).update(dict.fromkeys(key for key in metrics if key != "perplexity"))
    return {name: list(of) for name, of in keys.items()}


def _score(variant: dict, set_name: str, metric: str) -> dict | None:
    return variant.get("metrics", {}).get(set_name, {}).get(metric)


def _seeds(result: dict) -> str:
    seeds = len(result["seeds"])
    return f"mean of {seeds} seeds ± half its 95% interval" if seeds > 1 else "one seed, so no interval"


def _skipped(variant: dict) -> str:
    return f"skipped: {variant['refused']}" if variant.get("refused") else ""


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
