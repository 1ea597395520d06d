"""A comparison in the terminal: a table of scores for each eval set, and one of what the variants cost. Imports no torch."""

from rich.console import Console
from rich.table import Table

from lora_ft.commands.compare.summary import shown_metrics
from lora_ft.core.messages import printable
from lora_ft.core.metrics import format_metric, metric_of

COSTS = {  # key -> (title, how it is written)
    "trainable_parameters": ("trained", "{:,}"),
    "trainable_share": ("share", "{:.3%}"),
    "bytes_on_disk": ("on disk, MiB", "{:,.2f}"),
    "peak_memory_mb": ("peak, MiB", "{:,.0f}"),
    "seconds_per_step": ("s a step", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


def show(result: dict) -> None:
    console = Console(highlight=False)
    seeds = len(result["seeds"])
    spread = f"mean of {seeds} seeds with its 95% interval" if seeds > 1 else "one seed, so no interval"
    for name, names in shown_metrics(all_metrics(result)).items():
        table = Table(title=f"{name}: {spread}" if name else spread)
        table.add_column("", overflow="fold")
        for key in result["tuned"]:
            table.add_column(key.rpartition(".")[2], justify="right")
        for metric in names:
            table.add_column(metric_of(metric).title, justify="right")
        if base := result["base"].get(name):
            blank = [""] * len(result["tuned"])
            table.add_row("base", *blank, *(format_metric(m, base[m]) if m in base else "" for m in names))
        for variant in result["variants"]:
            tuned = [variant["tuned"].get(key, "") for key in result["tuned"]]
            scores = variant.get("metrics", {}).get(name, {})
            table.add_row(printable(variant["name"]), *tuned, *(score(m, scores.get(m)) for m in names))
        console.print(table)
    costs = Table(title="what it takes")
    costs.add_column("", overflow="fold")
    for title, _ in COSTS.values():
        costs.add_column(title, justify="right")
    for variant in result["variants"]:
        costs.add_row(printable(variant["name"]), *cost_cells(variant))
    console.print(costs)
    if rows := latency_rows(result):
        table = Table(title="inference, ms (and how many times the base's, measured by turns)")
        tokens = next(v["latency"]["prompt_tokens"] for v in result["variants"] if v.get("latency"))
        for title in ("", f"a prompt of {tokens} tokens", "each new token"):
            table.add_column(title, justify="right" if title else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        console.print(table)
    for variant in result["variants"]:
        if variant.get("refused"):
            console.print(
                f"{printable(variant['name'])}: left out: {printable(variant['refused'], 500)}", soft_wrap=True
            )


def all_metrics(result: dict) -> dict[str, dict]:
    """Eval set -> metrics of any variant."""
    found: dict[str, dict] = {}
    for variant in result["variants"]:
        for name, of in variant.get("metrics", {}).items():
            found.setdefault(name, {}).update(of)
    return found


def score(metric: str, spread: dict | None) -> str:
    """`86.2% ± 1.1` of a mean and its interval."""
    if spread is None:
        return ""
    mean = format_metric(metric, spread["mean"])
    if "ci95" not in spread:
        return mean
    half = spread["ci95"][1] - spread["mean"]
    return f"{mean} ± {100 * half:.1f}" if mean.endswith("%") else f"{mean} ± {half:.2g}"


def cost_cells(variant: dict) -> list[str]:
    values = {k: variant.get(k) for k in COSTS}
    if values["bytes_on_disk"] is not None:
        values["bytes_on_disk"] /= 2**20
    return ["" if values[k] is None else form.format(values[k]) for k, (_, form) in COSTS.items()]


def latency_rows(result: dict) -> list[list[str]]:
    """(variant, a prompt, a new token) of each form that was measured."""
    rows = []
    for variant in result["variants"]:
        for form, of in variant.get("latency", {}).items():
            if form in ("adapter", "merged"):
                cells = [f"{of[f'{k}_ms']:.1f} ({of[f'{k}_ratio']:.3f} x)" for k in ("prompt", "token")]
                rows.append([variant["name"] + (", merged" if form == "merged" else ""), *cells])
    return rows
