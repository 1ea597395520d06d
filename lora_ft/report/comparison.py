"""One page that compares runs or variants: sections of tables and charts, for `lora-ft report` and `lora-ft compare`."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_ft.core.metrics import format_difference, metric_of, scalars
from lora_ft.core.names import portable_name
from lora_ft.report.charts import Chart, run_look
from lora_ft.report.curves import comparison_charts
from lora_ft.report.figures import differing_settings, run_figures
from lora_ft.report.render import render
from lora_ft.report.runs import RunData, eval_set_names
from lora_ft.report.scores import metric_cell


@dataclass(frozen=True)
class Row:
    """cells: text, or a value with its interval. look: the colour of the run's lines in charts. note: below the name."""

    name: str
    cells: Sequence[str | dict[str, str]]
    look: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """columns: titles of the columns after the names of the rows. numbers: align them on the right."""

    columns: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    numbers: bool = True


@dataclass(frozen=True)
class Section:
    """notice: a warning below the tables; note: small print. text: shown as it is, below all."""

    title: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notice: str = ""
    note: str = ""
    text: str = ""


def comparison_page(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The HTML of a comparison; sections without content are left out."""
    shown = [s for s in sections if s.tables or s.charts or s.notice or s.note or s.text]
    return render("comparison.html", title=title, subtitle=subtitle, sections=shown)


def compare_runs(runs: Sequence[RunData]) -> str:
    """The page of several runs: scores, curves, settings that differ, costs."""
    names = [str(run.folder) for run in runs]
    figures = [dict(run_figures(run)) for run in runs]
    titles = dict.fromkeys(title for of in figures for title in of)
    costs = [Row(title, [of.get(title, "") for of in figures]) for title in titles]
    settings = [Row(setting, values) for setting, values in differing_settings(runs)]
    same_data = len({_eval_hashes(run) for run in runs if run.metrics}) <= 1
    scores = _score_tables(runs, names)
    notice = "" if same_data else "These runs were scored on different eval data: do not compare their scores."
    sections = [
        Section("Scores", scores, notice=notice, note="" if scores else "None of these runs has been evaluated."),
        Section("Curves", charts=comparison_charts(runs, names)),
        Section("Settings", [Table(names, settings, numbers=False)], note="Only those that differ."),
        Section("Cost", [Table(names, costs)]),
    ]
    return comparison_page(f"{len(runs)} runs compared", sections)


def _cell(key: str, metrics: dict) -> dict[str, str]:
    """A metric of a run and how it differs from the base's on the same rows; its own interval if they were not compared."""
    cell, compared = metric_cell(key, metrics), format_difference(key, metrics)
    return cell | ({"interval": f"base {compared}"} if compared else {})


def _eval_hashes(run: RunData) -> tuple:
    """What identifies a run's eval data: the hash of each set."""
    data = run.record["data"].get("eval") or {}
    return tuple((data.get(name) or {}).get("sha256") for name in eval_set_names(run.record)) or (data.get("sha256"),)


def _score_tables(runs: Sequence[RunData], names: Sequence[str]) -> list[Table]:
    """A table per eval set: a row per run, and before them the bases, each once."""
    tables = []
    for set_name in dict.fromkeys(name for run in runs for name in run.metrics):
        keys = list(dict.fromkeys(key for run in runs for key in scalars(run.metrics.get(set_name, {}))))
        bases: dict[tuple, Row] = {}
        rows = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            if base := run.base_metrics.get(set_name):
                cells = [metric_cell(key, base) for key in keys]
                title = f"base {portable_name(str(run.record['base'].get('name')))}"
                bases.setdefault(tuple(cell["value"] for cell in cells), Row(title, [*cells, ""], "base"))
            cells = [_cell(key, run.metrics.get(set_name, {})) for key in keys]
            rows.append(Row(name, [*cells, str(run.step)], run_look(i), "" if run.finished else "not finished"))
        columns = [*(metric_of(key).title for key in keys), "step"]
        tables.append(Table(columns, [*bases.values(), *rows], set_name))
    return tables
