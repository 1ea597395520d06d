"""The charts of a run's log, and those of several runs together."""

from collections.abc import Sequence
from functools import partial

from lora_ft.core.intervals import wilson_interval
from lora_ft.core.metrics import add_set_name, format_metric, full_scale, metric_of, scalars
from lora_ft.report.charts import Chart, Line, chart, run_look, running_mean
from lora_ft.report.runs import RunData, eval_examples

MAX_METRIC_CHARTS = 8
COUNT = "{:,.0f}".format


def run_charts(run: RunData) -> list[Chart]:
    """The charts of one run: losses, metrics beside the base's, learning rate, gradient norm, speed, memory."""
    training, held_out = _with_mean(_series(run, "loss"), "training"), _series(run, "eval_loss")
    loss = [*training, *_base_line(run, "eval_loss"), Line("eval loss", held_out, "eval", dots=True)]
    unit, seconds = _time_unit([run])
    speed, memory = (_series(run, name, "seconds", seconds) for name in ("tokens_per_second", "peak_memory_mb"))
    charts = [
        chart("Loss", loss, auto_log=True),
        chart("Learning rate", [Line("", _series(run, "learning_rate"), "mean")], from_zero=True),
        *(
            _eval_chart(name, [*_base_line(run, name), _eval_line(run, name, "adapter", "eval")])
            for name in _eval_keys([run])
            if name != "eval_loss"
        ),
        chart("Gradient norm", _with_mean(_series(run, "grad_norm"), "norm"), auto_log=True),
        chart("Tokens per second", _with_mean(speed, "tokens/s"), unit, from_zero=True, y_format=COUNT),
        chart("Peak memory so far, MiB", [Line("", memory, "mean")], unit, from_zero=True, y_format=COUNT),
    ]
    return [c for c in charts if c]


def comparison_charts(runs: Sequence[RunData], names: Sequence[str]) -> list[Chart]:
    """The charts that compare runs: one line per run in each."""
    unit, seconds = _time_unit(runs)

    def lines(y: str, x: str = "step", mean: bool = False) -> list[Line]:
        drawn = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            points = _series(run, y, x, seconds if x == "seconds" else 1.0)
            drawn.append(Line(name, (running_mean(points) if mean else []) or points, run_look(i)))
        return drawn

    def scores(key: str) -> list[Line]:
        return [
            _eval_line(run, key, name, run_look(i), named=True)
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ]

    speed, memory = lines("tokens_per_second", "seconds", mean=True), lines("peak_memory_mb", "seconds")
    charts = [
        chart("Training loss", lines("loss", mean=True), auto_log=True),
        *(_eval_chart(key, scores(key)) for key in _eval_keys(runs)),
        chart("Learning rate", lines("learning_rate"), from_zero=True),
        chart("Tokens per second", speed, unit, from_zero=True, y_format=COUNT),
        chart("Peak memory so far, MiB", memory, unit, from_zero=True, y_format=COUNT),
    ]
    return [c for c in charts if c]


def _eval_chart(name: str, lines: Sequence[Line]) -> Chart | None:
    """The chart of a metric by its key in the log, such as `eval_dev_accuracy`."""
    key = name.removeprefix("eval_")
    y_format, is_loss = partial(format_metric, key), key.endswith("loss")
    title = f"Eval {metric_of(key).title}"
    return chart(title, lines, y_format=y_format, full_scale=full_scale(key), auto_log=is_loss)


def _eval_line(run: RunData, name: str, title: str, look: str, named: bool = False) -> Line:
    """A metric at each evaluation, by its key in the log; an accuracy with its interval, which the log does not have."""
    points, set_name = _series(run, name), name.removeprefix("eval_").removesuffix("accuracy").rstrip("_")
    examples = eval_examples(run.record, set_name) if name.endswith("accuracy") else 0
    intervals = (
        {x: wilson_interval(round(y * examples), examples) for x, y in points if 0 <= y <= 1} if examples else {}
    )
    return Line(title, points, look, dots=True, intervals=intervals, named=named)


def _series(run: RunData, y: str, x: str = "step", per: float = 1.0) -> list[tuple[float, float]]:
    """(x / per, y) of the log's lines that have both."""
    return [(line[x] / per, line[y]) for line in run.log if x in line and y in line]


def _with_mean(points: Sequence[tuple[float, float]], name: str) -> list[Line]:
    if mean := running_mean(points):
        return [Line(name, points, "raw"), Line(f"{name}, running mean", mean, "mean")]
    return [Line(name, points, "mean")]


def _base_line(run: RunData, name: str) -> list[Line]:
    """The base's value of a metric, by its key in the log, as a horizontal line over all steps."""
    metrics = [add_set_name(set_name, scalars(of_set)) for set_name, of_set in run.base_metrics.items()]
    value = next((of[key] for of in metrics if (key := name.removeprefix("eval_")) in of), None)
    steps = [line["step"] for line in run.log]
    if value is None or not steps:
        return []
    return [Line("base", [(min(steps), value), (max(steps), value)], "base")]


def _eval_keys(runs: Sequence[RunData]) -> list[str]:
    """The logged losses of eval sets, then their metrics besides perplexity, which shows nothing that the loss does not."""
    keys = dict.fromkeys(key for run in runs for line in run.log for key in line if key.startswith("eval_"))
    losses = [key for key in keys if key.endswith("loss")]
    return losses + [key for key in keys if not key.endswith(("loss", "perplexity"))][:MAX_METRIC_CHARTS]


def _time_unit(runs: Sequence[RunData]) -> tuple[str, float]:
    """The unit of time that suits the longest run, and its seconds."""
    longest = max((line.get("seconds", 0) for run in runs for line in run.log), default=0)
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
