"""A comparison as tables, from the content of compare.json, and in the terminal. Imports no torch."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich import table as rich_table
from rich.console import Console

from lora_ft.commands.compare.results import mean_interval
from lora_ft.core.intervals import difference_interval
from lora_ft.core.messages import printable
from lora_ft.core.metrics import VS_BASE, format_difference, format_metric, metric_of, verdict
from lora_ft.report.charts import run_look
from lora_ft.report.comparison import Row, Table
from lora_ft.report.winner import winner

COSTS = {  # key -> (title, format)
    "trainable_parameters": ("trained", "{:,}".format),
    "trainable_share": ("share", "{:.2%}".format),
    "bytes_on_disk": ("disk, MiB", lambda size: f"{size / 2**20:,.2f}"),
    "peak_memory_mb": ("peak, MiB", "{:,.0f}".format),
    "seconds_per_step": ("s/step", "{:.3f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
}


BASE_TITLE = "first seed against the base, row by row"


def show(result: dict) -> None:
    """Print the tables on stdout, and which variants were skipped."""
    console = Console(highlight=False, markup=False, emoji=False)
    scores = [
        (f"{t.title}: {seeds(result)}" if t.title else seeds(result), t) for t in score_tables(result, format_mean)
    ]
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
    if any(v.get("runs") and "seconds_per_step" not in v for v in result["variants"]):
        console.print("Time and memory are not known of variants that were trained together (--one-by-one).")
    found = result_winner(result)
    console.print(f"{printable(found['sentence'], 500)} {printable(found['detail'], 500)}", soft_wrap=True)
    for variant in result["variants"]:
        if reason := skipped(variant):
            console.print(f"{printable(variant['name'])}: {printable(reason, 500)}", soft_wrap=True)


def score_tables(result: dict, mean_cell: Callable[[str, dict | None], Any]) -> list[Table]:
    """A table per eval set: base and variants, the settings that were tuned, and the metrics' means as `mean_cell` has them."""
    tables, tuned = [], list(result["tuned"])
    for name, keys in metric_keys(result).items():
        rows = []
        if base := result["base"].get(name):
            scores = [format_metric(key, base[key]) if key in base else "" for key in keys]
            rows.append(Row("base", [*("" for _ in tuned), *scores], "base"))
        for i, variant in enumerate(result["variants"]):
            scores = [mean_cell(key, score_of(variant, name, key)) for key in keys]
            cells = [variant["tuned"].get(key, "") for key in tuned] + scores
            rows.append(Row(variant["name"], cells, run_look(i), "skipped" if skipped(variant) else ""))
        columns = [key.rpartition(".")[2] for key in tuned] + [metric_of(key).title for key in keys]
        tables.append(Table(columns, rows, name))
    return tables


def base_tables(result: dict) -> list[Table]:
    """A table per eval set: how each variant's first run differs from the base in the ranking metric, with its interval."""
    metric, tables = result["metric"][1], []
    for name in metric_keys(result):
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
    """A mean with half its interval, to the same decimals, `86.2% ± 1.1`; "" for None."""
    if entry is None:
        return ""
    mean = format_metric(key, entry["mean"])
    if "ci95" not in entry:
        return mean
    half = entry["ci95"][1] - entry["mean"]
    decimals = len(mean.rstrip("%").partition(".")[2])
    return f"{mean} ± {half * (100 if mean.endswith('%') else 1):,.{decimals}f}"


def tuning_table(result: dict) -> Table:
    """A row per variant and point of the tuning grid."""
    key, rows = result["tuning_metric"], []
    for variant in result["variants"]:
        for tried in variant["tried"]:
            chosen = " (chosen)" if tried["settings"] == variant["tuned"] else ""
            settings = ", ".join(f"{name}={value}" for name, value in tried["settings"].items())
            score = "failed" if tried["score"] is None else format_metric(key, tried["score"])
            rows.append(Row(variant["name"], [settings + chosen, f"1/{round(1 / tried['part'])} of the steps", score]))
    return Table(["tried", "until", f"{metric_of(key).title}, held out"], rows, numbers=False)


def metric_keys(result: dict) -> dict[str, list[str]]:
    """Eval set -> the metrics of any variant, losses last; no perplexity, which shows nothing that the loss does not."""
    keys: dict[str, dict[str, None]] = {}
    for variant in result["variants"]:
        for name, metrics in variant.get("metrics", {}).items():
            keys.setdefault(name, {}).update(dict.fromkeys(key for key in metrics if key != "perplexity"))
    return {name: sorted(of, key=lambda key: key.endswith("loss")) for name, of in keys.items()}


def result_winner(result: dict) -> dict[str, str]:
    """Which variant has won by the ranking metric, in words: of `winner`.

    Of several seeds, the difference of two variants is that of the runs with the same seed. Of one, it is of the eval rows,
    from the comparisons of both with the base.
    """
    set_name, metric = result["metric"]
    scored = [variant for variant in result["variants"] if score_of(variant, set_name, metric)]
    values = [variant["metrics"][set_name][metric]["values"] for variant in scored]
    by_seed = [dict(zip(variant.get("runs", {}), of, strict=False)) for variant, of in zip(scored, values, strict=True)]
    several = len(result["seeds"]) > 1

    def difference(i: int, j: int) -> Sequence[float] | None:
        if several:
            differences = [round(by_seed[i][s] - by_seed[j][s], 9) for s in by_seed[i] if s in by_seed[j]]
            if len({*differences}) > 1:
                return mean_interval(differences)["ci95"]
            return None  # without any spread over the seeds there is nothing to estimate an interval from
        a, b = (scored[k].get("vs_base", {}).get(set_name, {}).get(metric + VS_BASE) for k in (i, j))
        return difference_interval(a["difference"], a["ci95"], b["difference"], b["ci95"]) if a and b else None

    basis = f"over {len(result['seeds'])} seeds, on these eval rows" if several else "of the eval rows, with one seed"
    found = winner(
        metric, [(v["name"], statistics.mean(of)) for v, of in zip(scored, values, strict=True)], difference, basis
    )
    if not several and len(scored) > 1:
        found["detail"] += " Another seed may turn it: --seeds 0,1,2."
    against: dict = next((v.get("vs_base", {}).get(set_name, {}) for v in scored if v["name"] == found["best"]), {})
    if compared := format_difference(metric, against):
        found["detail"] += f" Against the base, {found['best']} has {compared}: {verdict(metric, against)}."
    return found


def score_of(variant: dict, set_name: str, metric: str) -> dict | None:
    """A metric of a variant: mean, values and interval over the seeds."""
    return variant.get("metrics", {}).get(set_name, {}).get(metric)


def seeds(result: dict) -> str:
    """What the scores are, in words."""
    count = len(result["seeds"])
    return f"mean of {count} seeds ± half its 95% interval" if count > 1 else "one seed, so no interval"


def skipped(variant: dict) -> str:
    """Why a variant was left out, or ""."""
    return f"skipped: {variant['refused']}" if variant.get("refused") else ""
