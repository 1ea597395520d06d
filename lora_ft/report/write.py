"""report.html and curves.png of a run, and one page that compares several. Self-contained: no script, no request."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError
from lora_ft.core.metrics import metric_of, scalars, selection_metric
from lora_ft.core.names import portable_name
from lora_ft.core.storage import write_file
from lora_ft.core.version import __version__
from lora_ft.methods.model_card import method_of, peft_snippet, what_it_is
from lora_ft.report.curves import curves, curves_of_all
from lora_ft.report.figures import config_text, data_table, differing, figures, origin
from lora_ft.report.runs import Run, read_run, set_names
from lora_ft.report.scores import cell, headline, results


def write_report(run: Run, page: Path | None = None) -> Path | None:
    """Write the report of a run that has a log, into its folder or as `page`; the page, or None if there is nothing to show.

    Raises:
        FilesError: a file of someone else's has that name, or it can't be written.
    """
    if not run.lines and not run.finished:
        return None
    if page is None:
        page, picture = run.folder / run_folder.REPORT, run.folder / run_folder.CURVES
        check_ours(page, picture)
        if charts := curves(run):
            from lora_ft.report.png import charts_png  # matplotlib, which takes a second

            write_file(picture, charts_png(charts))
    check_ours(page)
    write_file(page, report_page(run))
    return page


def write_comparison(runs: Sequence[Run], page: Path) -> None:
    """Write one page that compares runs.

    Raises:
        FilesError: a file of someone else's has that name, or it can't be written.
    """
    check_ours(page)
    write_file(page, comparison_page(runs))


def check_ours(*paths: Path) -> None:
    for path in paths:
        if path.exists() and not run_folder.is_own_report(path):
            raise FilesError(f"{path}: there already, and not of this tool. Move it, or name another: --output FILE.")


def report_page(run: Run) -> str:
    record = run.record
    eval_data = record["data"].get("eval") or {}
    named = [f"{(eval_data.get(name) or {}).get('examples', 0):,} of {name}" for name in set_names(record)]
    about = f"On {', '.join(named) or format(eval_data.get('examples', 0), ',')} eval examples."
    if run.finished and run.step != run.last:
        chosen = selection_metric(
            str((record["config"].get("train") or {}).get("metric_for_best_model")), set_names(record) or [""]
        )
        where = f"those of {chosen[0]}" if chosen and chosen[0] else "these same examples"
        about += (
            f" The adapter is that of step {run.step}, the best of {run.last} on {where}:"
            " a figure that was chosen so is a little too good."
        )
    checkpoints, method = run_folder.checkpoints(run.folder), method_of(record)
    return render(
        "run.html",
        title=f"{run.folder}: lora-ft report",
        name=str(run.folder),
        folder=str(run.folder),
        adapter=what_it_is(record),
        base=portable_name(str(record["base"].get("name"))),
        finished=run.finished,
        why=run.why,
        step=run.step,
        last=run.last,
        planned=record.get("planned_steps"),
        headline=headline(run),
        results=results(run),
        scored_base=bool(run.base_metrics),
        eval_about=about,
        samples=run.samples,
        figures_=figures(run),
        charts=curves(run),
        snippet=peft_snippet(record, str(run.folder)) if run.finished and method in ("lora", "prompt") else "",
        merges=method == "lora",
        checkpoint=str(checkpoints[-1]) if checkpoints else "",
        data=data_table(run),
        origin=origin(run),
        config=config_text(run),
    )


def comparison_page(runs: Sequence[Run]) -> str:
    names = [str(run.folder) for run in runs]
    eval_data = {_encoded(run) for run in runs if run.metrics}
    took = [dict(figures(run)) for run in runs]
    return render(
        "runs.html",
        title=f"{len(runs)} runs compared",
        names=names,
        sets=comparison(runs, names),
        different_data=len(eval_data) > 1,
        charts=curves_of_all(runs, names),
        differing=differing(runs),
        took=[(what, [t.get(what, "") for t in took]) for what in dict.fromkeys(k for t in took for k in t)],
    )


def _encoded(run: Run) -> tuple:
    """What is known of a run's eval data: hashes, of each set."""
    about = run.record["data"].get("eval") or {}
    return tuple((about.get(name) or {}).get("sha256") for name in set_names(run.record)) or (about.get("sha256"),)


def comparison(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each eval set: titles of its metrics, and a row a run, the bases (each once) before them."""
    sets = []
    for name in dict.fromkeys(n for run in runs for n in run.metrics):
        metrics = list(dict.fromkeys(m for run in runs for m in scalars(run.metrics.get(name, {}))))
        rows: list[dict] = []
        bases: set[tuple] = set()
        for i, (run, named) in enumerate(zip(runs, names, strict=True)):
            base = run.base_metrics.get(name)
            cells = [cell(m, base or {}) for m in metrics]
            if base and (key := tuple(c["value"] for c in cells)) not in bases:
                bases.add(key)
                title = f"base {portable_name(str(run.record['base'].get('name')))}"
                rows.insert(len(bases) - 1, {"name": title, "look": "base", "note": "", "cells": cells, "step": ""})
            own = [cell(m, run.metrics.get(name, {})) for m in metrics]
            note = "" if run.finished else "not finished"
            rows.append({"name": named, "look": f"run-{i % 8 + 1}", "note": note, "cells": own, "step": run.step})
        sets.append({"name": name, "titles": [metric_of(m).title for m in metrics], "rows": rows})
    return sets


def render(template: str, **facts: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_ft.report", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=__version__, **facts)


def report_command(folders: Sequence[Path], page: Path | None) -> None:
    """Write the page of a run's output or of several, and print its path.

    Raises:
        ModelError: no run is there. FilesError: as `write_report`.
    """
    runs = [read_run(folder) for folder in folders]
    if len(runs) > 1:
        page = page or Path("compare-report.html")
        write_comparison(runs, page)
    else:
        page = write_report(runs[0], page)
    print(page)
