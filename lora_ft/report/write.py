"""report.html and curves.svg of a run, and `lora-ft report`."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_ft.core import run_folder
from lora_ft.core.messages import echo, warn
from lora_ft.core.metrics import metric_of, selection_metric
from lora_ft.core.names import portable_name
from lora_ft.core.storage import write_json
from lora_ft.methods.model_card import what_it_is
from lora_ft.methods.usage import method_of, peft_snippet
from lora_ft.report.comparison import compare_runs
from lora_ft.report.confusion import shortened
from lora_ft.report.curves import run_charts
from lora_ft.report.figures import config_text, data_table, hashes, provenance, rates_tried, run_figures
from lora_ft.report.render import render, write_page
from lora_ft.report.runs import RunData, eval_set_names, evaluation_steps, read_run_data
from lora_ft.report.scores import headline, score_tables

COMPARISON = "compare-report.html"


def write_report(
    output: Path, record: dict, stop_reason: str | None = None, samples: Callable[[], dict] | None = None
) -> None:
    """Write the report of a run that has just ended. A failure is only a warning: the run matters more.

    `record` is what lora_ft.json is about to hold, or what is known of a run that ended early, for `stop_reason`. `samples`
    makes the answers and rows that the report shows; they go to samples.json.
    """
    try:
        if samples:
            content = samples()
            if any(content.values()):
                content = {"made_by": "lora-ft", "step": record.get("step")} | content
                write_json(output / run_folder.SAMPLES, content)
        run = read_run_data(output, record, stop_reason)
        if run.finished or run.last_step:
            write_run_report(run)
    except Exception as e:
        warn(f"no report ({type(e).__name__}: {e})")


def write_run_report(run: RunData, page: Path | None = None) -> Path:
    """Write a run's report into its folder, with curves.svg, or as `page` alone; returns its path. Raises as `write_page`."""
    path = page or run.folder / run_folder.REPORT
    write_page(path, report_page(run))
    if page is None and (charts := run_charts(run)):
        write_page(run.folder / run_folder.CURVES, render("curves.svg", charts=charts))
    return path


def report_page(run: RunData) -> str:
    """The HTML of a run's report."""
    record, folder = run.record, str(run.folder)
    checkpoints, method = run_folder.checkpoints(run.folder), method_of(record)
    return render(
        "run.html",
        title=f"{folder}: lora-ft report",
        run=run,
        folder=folder,
        adapter=what_it_is(record),
        base=shortened(portable_name(str(record["base"].get("name"))), 200),
        headline=headline(run),
        results=score_tables(run),
        selection_note=_selection_note(run),
        run_figures=run_figures(run),
        rates=rates_tried(run.record),
        charts=run_charts(run),
        snippet=peft_snippet(record, folder) if run.finished and method in ("lora", "prompt") else "",
        merges=method == "lora",
        usable=shlex.quote(folder) if run.finished else shlex.quote(str(checkpoints[-1])) if checkpoints else "",
        data=data_table(run),
        provenance=provenance(run),
        hashes=hashes(run),
        config=config_text(record["config"]),
    )


def _selection_note(run: RunData) -> str:
    """Whether the step was selected by these scores, which makes them slightly too good; "" if not."""
    names = eval_set_names(run.record)
    train = run.record["config"].get("train") or {}
    chosen = selection_metric(str(train.get("metric_for_best_model")), names or [""])
    evaluations = len(evaluation_steps(run.log))
    if not run.finished or not train.get("load_best_model_at_end") or not chosen or evaluations < 2:
        return ""
    name, metric = chosen
    others = [other for other in names if other != name]
    judged = f" Those on {', '.join(others)} are not: that data chose nothing." if others else ""
    return (
        f"The adapter is that of step {run.step}, the best of {evaluations} evaluations by {metric_of(metric).title} on"
        f" {name or 'these same examples'}: scores {f'on {name} ' if name else ''}are slightly too good for that.{judged}"
    )


def report_command(folders: Sequence[Path], page: Path | None) -> None:
    """Write the report of a run, or one page that compares several, and print its path. Raises as `read_run_data`."""
    if len(folders) == 1:
        page = write_run_report(read_run_data(folders[0]), page)
    else:
        write_comparison(folders, page := page or Path(COMPARISON))
    echo(page)


def write_comparison(folders: Sequence[Path], page: Path) -> None:
    """Write a page that compares runs. Raises as `read_run_data` and `write_page`."""
    write_page(page, compare_runs([read_run_data(folder) for folder in folders]))
