"""Which curves a run's log gives, and those of several runs."""

from collections.abc import Sequence
from functools import partial

from lora_ft.core.metrics import add_set_name, format_metric, metric_of, scalars
from lora_ft.report.charts import Chart, Line, chart, running_mean
from lora_ft.report.runs import Run


def points(run: Run, y: str, x: str = "step") -> list[tuple[float, float]]:
    return [(line[x], line[y]) for line in run.lines if x in line and y in line]


def smoothed(values: Sequence[tuple[float, float]], name: str) -> list[Line]:
    mean = running_mean(values)
    return (
        [Line(name, values, "raw"), Line(f"{name}, running mean", mean, "mean")]
        if mean
        else [Line(name, values, "mean")]
    )


def logged(runs: Sequence[Run]) -> list[str]:
    """What evaluations logged."""
    return list(dict.fromkeys(k for run in runs for line in run.lines for k in line if k.startswith("eval_")))


def logged_losses(runs: Sequence[Run]) -> list[str]:
    """Of each eval set, one."""
    return [name for name in logged(runs) if name.endswith("loss")]


def logged_metrics(runs: Sequence[Run]) -> list[str]:
    """What evaluations logged beside losses; perplexity says what loss does."""
    return [name for name in logged(runs) if not name.endswith(("loss", "perplexity"))]


def base_line(run: Run, name: str) -> list[Line]:
    flat = {
        key: value
        for of, metrics in run.base_metrics.items()
        for key, value in add_set_name(of, scalars(metrics)).items()
    }
    value, steps = flat.get(name), [line["step"] for line in run.lines]
    return [Line("base", [(min(steps), value), (max(steps), value)], "base")] if value is not None and steps else []


def clock(runs: Sequence[Run]) -> tuple[str, float]:
    """The unit in which the longest of the runs is best told, and its seconds."""
    longest = max((line.get("seconds", 0) for run in runs for line in run.lines), default=0)
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)


def curves(run: Run) -> list[Chart]:
    evaluated = Line("eval loss", points(run, "eval_loss"), "eval", dots=True)
    loss = [*smoothed(points(run, "loss"), "training"), *base_line(run, "loss"), evaluated]
    named = [name for name in logged_losses([run]) if name != "eval_loss"]
    charts = [
        chart("Loss", loss, may_be_log=True),
        chart("Learning rate", [Line("", points(run, "learning_rate"), "mean")], zero=True),
    ]
    for name in [*named, *logged_metrics([run])[:8]]:
        own = name.removeprefix("eval_")
        line = Line("adapter", points(run, name), "eval", dots=True)
        charts.append(
            chart(f"Eval {metric_of(own).title}", [*base_line(run, own), line], form=partial(format_metric, own))
        )
    unit, seconds = clock([run])
    over = {
        name: [(s / seconds, y) for s, y in points(run, name, "seconds")]
        for name in ("tokens_per_second", "peak_memory_mb")
    }
    charts += [
        chart("Gradient norm", smoothed(points(run, "grad_norm"), "norm"), may_be_log=True),
        chart("Tokens per second", smoothed(over["tokens_per_second"], "tokens/s"), unit, zero=True),
        chart(
            "Peak memory so far, MiB",
            [Line("", over["peak_memory_mb"], "mean")],
            unit,
            zero=True,
            form=lambda y: f"{y:,.0f}",
        ),
    ]
    return [c for c in charts if c]


def curves_of_all(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """One line a run in each chart."""

    def each(y: str, dots: bool = False, x: str = "step", per: float = 1.0, mean: bool = False) -> list[Line]:
        lines = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            found = [(x_value / per, value) for x_value, value in points(run, y, x)]
            lines.append(Line(name, (running_mean(found) if mean else []) or found, f"run-{i % 8 + 1}", dots))
        return lines

    unit, seconds = clock(runs)
    charts = [
        chart("Training loss", each("loss", mean=True), may_be_log=True),
        *(
            chart(f"Eval {metric_of(name.removeprefix('eval_')).title}", each(name, dots=True), may_be_log=True)
            for name in logged_losses(runs)
        ),
        *(
            chart(f"Eval {metric_of(own).title}", each(name, dots=True), form=partial(format_metric, own))
            for name in logged_metrics(runs)[:8]
            for own in [name.removeprefix("eval_")]
        ),
        chart("Learning rate", each("learning_rate"), zero=True),
        chart("Tokens per second", each("tokens_per_second", x="seconds", per=seconds, mean=True), unit, zero=True),
        chart("Peak memory so far, MiB", each("peak_memory_mb", x="seconds", per=seconds), unit, zero=True),
    ]
    return [c for c in charts if c]
