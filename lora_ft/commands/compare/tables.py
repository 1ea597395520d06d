"""The tables of a comparison, from the content of compare.json, and how the terminal shows them. Imports no torch."""

from rich import table as rich_table
from rich.console import Console

from lora_ft.core.messages import printable
from lora_ft.core.metrics import format_metric, metric_of
from lora_ft.report.charts import run_look
from lora_ft.report.comparison import Row, Table

MIB = 2**20
COSTS = {  # key -> (title, format, unit)
    "trainable_parameters": ("trained", "{:,}", 1),
    "trainable_share": ("share", "{:.3%}", 1),
    "bytes_on_disk": ("disk, MiB", "{:,.2f}", MIB),
    "peak_memory_mb": ("peak, MiB", "{:,.0f}", 1),
    "seconds_per_step": ("s/step", "{:.3f}", 1),
    "tokens_per_second": ("tokens/s", "{:,.0f}", 1),
}


def score_tables(result: dict) -> list[Table]:
    """Per eval set a table: base and variants, the settings that were tuned, and the metrics' means."""
    tables, tuned = [], list(result["tuned"])
    for name, keys in metric_keys(result).items():
        rows = []
        if base := result["base"].get(name):
            scores = [format_metric(key, base[key]) if key in base else "" for key in keys]
            rows.append(Row("base", [*("" for _ in tuned), *scores], "base"))
        for i, variant in enumerate(result["variants"]):
            metrics = variant.get("metrics", {}).get(name, {})
            cells = [variant["tuned"].get(key, "") for key in tuned] + [format_mean(k, metrics.get(k)) for k in keys]
            rows.append(Row(variant["name"], cells, run_look(i), _skipped(variant)))
        columns = [key.rpartition(".")[2] for key in tuned] + [metric_of(key).title for key in keys]
        tables.append(Table(columns, rows, name))
    return tables


def cost_table(result: dict) -> Table:
    """Parameters, bytes, memory and speed of the variants."""
    rows = []
    for i, variant in enumerate(result["variants"]):
        values = [(variant.get(key), text, unit) for key, (_, text, unit) in COSTS.items()]
        cells = ["" if v is None else text.format(v / unit if unit > 1 else v) for v, text, unit in values]
        rows.append(Row(variant["name"], cells, run_look(i)))
    return Table([title for title, *_ in COSTS.values()], rows)


def latency_tables(result: dict) -> list[Table]:
    """Latency of a prompt and of a new token, adapter and merged; [] unless benchmarks/latency.py has measured it."""
    rows, tokens = [], 0
    for variant in result["variants"]:
        latency = variant.get("latency") or {}
        for form in ("adapter", "merged"):
            if form in latency:
                of, tokens = latency[form], latency["prompt_tokens"]
                cells = [f"{of[f'{part}_ms']:.1f} ({of[f'{part}_ratio']:.3f}x)" for part in ("prompt", "token")]
                rows.append(Row(variant["name"] + (", merged" if form == "merged" else ""), cells))
    return [Table([f"prompt of {tokens} tokens, ms", "new token, ms"], rows)] if rows else []


def metric_keys(result: dict) -> dict[str, list[str]]:
    """Eval set -> the metrics of any variant, without perplexity, which shows nothing that the loss does not."""
    keys: dict[str, dict[str, None]] = {}
    for variant in result["variants"]:
        for name, metrics in variant.get("metrics", {}).items():
            keys.setdefault(name, {}).update(dict.fromkeys(key for key in metrics if key != "perplexity"))
    return {name: list(of) for name, of in keys.items()}


def format_mean(key: str, entry: dict | None) -> str:
    """A mean with half its interval, `86.2% ± 1.1`; "" for None."""
    if entry is None:
        return ""
    mean = format_metric(key, entry["mean"])
    if "ci95" not in entry:
        return mean
    half = entry["ci95"][1] - entry["mean"]
    return f"{mean} ± {100 * half:.1f}" if mean.endswith("%") else f"{mean} ± {half:.2g}"


def seeds_note(result: dict) -> str:
    """How many seeds the scores are of."""
    seeds = len(result["seeds"])
    return f"mean of {seeds} seeds ± half its 95% interval" if seeds > 1 else "one seed, so no interval"


def show(result: dict) -> None:
    """Print the tables on stdout, and which variants were skipped."""
    console = Console(highlight=False)
    scores = [(f"{t.title}: {seeds_note(result)}" if t.title else seeds_note(result), t) for t in score_tables(result)]
    latency = [("latency (times the base's)", table) for table in latency_tables(result)]
    for title, table in [*scores, ("cost", cost_table(result)), *latency]:
        printed = rich_table.Table(title=title)
        names_fit = all(len(row.name) <= 16 for row in table.rows)
        printed.add_column("", overflow="fold", no_wrap=names_fit)
        for i, column in enumerate(table.columns):
            longest = max((len(str(row.cells[i])) for row in table.rows), default=0)
            printed.add_column(column, justify="right", overflow="fold", no_wrap=longest >= len(column))
        for row in table.rows:
            printed.add_row(printable(row.name), *(printable(str(cell)) for cell in row.cells))
        console.print(printed)
    for variant in result["variants"]:
        if reason := _skipped(variant):
            console.print(f"{printable(variant['name'])}: {printable(reason, 500)}", soft_wrap=True)


def _skipped(variant: dict) -> str:
    return f"skipped: {variant['refused']}" if variant.get("refused") else ""
