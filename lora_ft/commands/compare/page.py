"""compare.html: a comparison's tables and what they mean as pictures. Imports no torch."""

from pathlib import Path

import yaml

from lora_ft.commands.compare.show import COSTS, all_metrics, cost_cells, latency_rows, score
from lora_ft.commands.compare.summary import shown_metrics
from lora_ft.core.metrics import format_metric, metric_of
from lora_ft.core.storage import write_file
from lora_ft.report.charts import Chart, Line, chart
from lora_ft.report.write import check_ours, render

PAGE = "compare.html"


def write_page(result: dict, folder: Path) -> None:
    """Write the page of what there is so far.

    Raises:
        FilesError: a file of someone else's has that name.
    """
    check_ours(folder / PAGE)
    write_file(folder / PAGE, page(result))


def page(result: dict) -> str:
    seeds, metric = len(result["seeds"]), result["metric"][1]
    sets = []
    for name, names in shown_metrics(all_metrics(result)).items():
        base = result["base"].get(name, {})
        rows = [(v, [score(m, v.get("metrics", {}).get(name, {}).get(m)) for m in names]) for v in result["variants"]]
        cells = [format_metric(m, base[m]) if m in base else "" for m in names]
        sets.append(
            {"name": name, "titles": [metric_of(m).title for m in names], "rows": rows, "base": cells if base else None}
        )
    return render(
        "compare.html",
        title=f"{len(result['variants'])} variants compared",
        variants=result["variants"],
        looks=[f"run-{i % 8 + 1}" for i in range(len(result["variants"]))],
        sets=sets,
        seeds=result["seeds"],
        spread=f"The mean of {seeds} seeds ± half its 95% interval by Student's t." if seeds > 1 else "One seed.",
        tuned=result["tuned"],
        tune_steps=result["tune_steps"],
        tuning_metric=metric_of(result["tuning_metric"]).title,
        score_of=lambda value: "failed" if value is None else format_metric(result["tuning_metric"], value),
        cost_titles=[title for title, _ in COSTS.values()],
        costs=[cost_cells(variant) for variant in result["variants"]],
        latency=latency_rows(result),
        prompt_tokens=next((v["latency"]["prompt_tokens"] for v in result["variants"] if v.get("latency")), 0),
        charts=pictures(result),
        metric=metric_of(metric).title,
        config=yaml.safe_dump(result["config"], sort_keys=False, allow_unicode=True),
        varied=result["varied"],
    )


def pictures(result: dict) -> list[Chart]:
    """The metric that variants are ranked by, against what each costs; what was forgotten; a number that was varied."""
    (name, metric), found = result["metric"], []

    def mean(variant: dict, of: str) -> dict | None:
        return variant.get("metrics", {}).get(of, {}).get(metric)

    def form(value: float) -> str:
        return format_metric(metric, value)

    def against(title: str, label: str, values: list[float | None], y_of: str = name, **axis) -> None:
        lines = []
        for i, (variant, x) in enumerate(zip(result["variants"], values, strict=True)):
            if x is not None and (y := mean(variant, y_of)):
                look = f"run-{i % 8 + 1}"
                lines.append(Line(variant["name"], [(x, y["mean"])], look, dots=True))
                if "ci95" in y:
                    lines.append(Line("", [(x, end) for end in y["ci95"]], look))
        drawn = chart(title, lines, label, form=form, **axis)
        found.extend([drawn] if drawn else [])

    variants, y = result["variants"], metric_of(metric).title
    for key in result["varied"]:
        numbers = [_number(v["settings"].get(key)) for v in variants]
        if len({n for n in numbers if n is not None}) > 1:
            against(f"{y} by {key}", key, numbers, log_x=True)
    against(
        f"{y} by trained parameters",
        "trained parameters",
        [v.get("trainable_parameters") for v in variants],
        log_x=True,
    )
    against(f"{y} by peak memory", "MiB", [v.get("peak_memory_mb") for v in variants])
    against(f"{y} by time of a step", "seconds", [v.get("seconds_per_step") for v in variants])
    token = [(v.get("latency") or {}).get("adapter", {}).get("token_ms") for v in variants]
    against(f"{y} by latency of a new token", "ms", token)
    for other in all_metrics(result):
        if other != name:
            own = [m["mean"] if (m := mean(v, name)) else None for v in variants]
            against(f"{y} on {other} by {y} on {name}", f"{y} on {name}", own, y_of=other, x_form=form)
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
