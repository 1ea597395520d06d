"""One page that compares runs or variants: sections of tables and charts, for `lora-ft report` and `lora-ft compare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.core.intervals import difference_interval
from lora_ft.core.metrics import VS_BASE, format_difference, interval, metric_of, scalars
from lora_ft.core.names import portable_name
from lora_ft.report.charts import Chart, run_look
from lora_ft.report.curves import comparison_charts
from lora_ft.report.figures import differing_settings, run_figures
from lora_ft.report.render import render
from lora_ft.report.runs import RunData, same_eval_data
from lora_ft.report.scores import interval_bars, is_loss, main_metric, metric_cell
from lora_ft.report.winner import winner


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
    """notice: a warning below the tables; note: small print. bars: of `interval_bars`. text: shown as it is, folded away."""

    title: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notice: str = ""
    note: str = ""
    text: str = ""
    bars: Sequence[dict[str, Any]] = ()


def comparison_page(title: str, headline: dict[str, str], sections: Sequence[Section], subtitle: str = "") -> str:
    """The HTML of a comparison, `headline` of `winner` first; sections without content are left out."""
    shown = [s for s in sections if s.tables or s.charts or s.notice or s.note or s.text or s.bars]
    return render("comparison.html", title=title, headline=headline, subtitle=subtitle, sections=shown)


def compare_runs(runs: Sequence[RunData]) -> str:
    """The page of several runs: who won, scores, curves, settings that differ, costs."""
    shared, names = distinct_names([str(run.folder) for run in runs])
    figures = [dict(run_figures(run)) for run in runs]
    titles = dict.fromkeys(title for of in figures for title in of)
    costs = [Row(title, [of.get(title, "") for of in figures]) for title in titles]
    settings = [Row(setting, values) for setting, values in differing_settings(runs)]
    scored = [run for run in runs if run.metrics]
    same_data = all(same_eval_data(scored[0], run) for run in scored[1:])
    scores = _score_tables(runs, names)
    notice = "" if same_data else "These runs were scored on different eval data: do not compare their scores."
    note = "Small: the difference from the base on the same rows, with its 95% interval; of the base, its own interval."
    headline, bars = _winner(runs, names, same_data)
    sections = [
        Section(
            "Scores",
            scores,
            notice=notice,
            note=note if scores else "None of these runs has been evaluated.",
            bars=bars,
        ),
        Section("Curves", charts=comparison_charts(runs, names)),
        Section(
            "Settings", [Table(names, settings, numbers=False)] if settings else [], note="Only those that differ."
        ),
        Section("Cost", [Table(names, costs)]),
    ]
    return comparison_page(f"{len(runs)} runs compared", headline, sections, f"Folders in {shared}" if shared else "")


def distinct_names(paths: Sequence[str]) -> tuple[str, list[str]]:
    """(the folders that all paths share, the paths without them); a path that is given twice keeps its name."""
    parts = [Path(path).parts for path in paths]
    shared = next((i for i, names in enumerate(zip(*parts, strict=False)) if len({*names}) > 1), 0)
    names = [str(Path(*of[shared:])) if of[shared:] else path for of, path in zip(parts, paths, strict=True)]
    return str(Path(*parts[0][:shared])) if shared else "", names


def _winner(
    runs: Sequence[RunData], names: Sequence[str], same_data: bool
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The headline and the bars of the metric that the runs are judged by; the difference of two runs is of the eval rows."""
    judged_by = {main_metric(run) for run in runs} - {None}
    scored = [(run, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True)) if main_metric(run)]
    if not same_data or len(judged_by) != 1 or len(scored) < 2:
        reason = "they were scored on different eval data" if not same_data else "there is no score that all have"
        detail = "lora-ft eval scores several adapters on the same rows." if len(scored) > 1 else ""
        return {"sentence": f"No winner: {reason}.", "detail": detail, "verdict": ""}, []
    ((set_name, key),) = judged_by  # type: ignore[misc]
    of_base = ("fingerprint", "name", "dtype", "quantization")  # a base in another form has other scores
    same_base = len({tuple(str(run.record["base"].get(key)) for key in of_base) for run, *_ in scored}) == 1
    metrics = [run.metrics[set_name] for run, *_ in scored]

    def difference(i: int, j: int) -> Sequence[float] | None:
        ends: list[tuple[float, Sequence[float] | None]] = [
            (of[key], interval(key, of)) for of in (metrics[i], metrics[j])
        ]
        compared = [entry for of in (metrics[i], metrics[j]) if (entry := of.get(f"{key}{VS_BASE}"))]
        if same_base and len(compared) == 2:  # what is hard for the base is so for both, and cancels out
            ends = [(entry["difference"], entry["ci95"]) for entry in compared]
        (a, a_ends), (b, b_ends) = ends
        return difference_interval(a, a_ends, b, b_ends) if a_ends and b_ends else None

    found = winner(
        key, [(name, of[key]) for (_, name, _), of in zip(scored, metrics, strict=True)], difference, "of the eval rows"
    )
    found["detail"] += " Another seed may turn it: lora-ft compare trains several." if found["verdict"] else ""
    marks = [(name, run_look(i), of[key], interval(key, of)) for (_, name, i), of in zip(scored, metrics, strict=True)]
    if base := scored[0][0].base_metrics.get(set_name, {}) if same_base else {}:
        marks.insert(0, ("base", "base", base[key], interval(key, base)))
    title = metric_of(f"{set_name}_{key}" if set_name else key).title
    return found, [interval_bars(key, title + (", 95% intervals" if interval(key, metrics[0]) else ""), marks)]


def _cell(key: str, metrics: dict) -> dict[str, str]:
    """A metric of a run and how it differs from the base's on the same rows; its own interval if they were not compared."""
    cell, compared = metric_cell(key, metrics), format_difference(key, metrics)
    return cell | ({"interval": compared} if compared else {})


def _score_tables(runs: Sequence[RunData], names: Sequence[str]) -> list[Table]:
    """A table per eval set: a row per run, and before them the bases, each once."""
    tables = []
    for set_name in dict.fromkeys(name for run in runs for name in run.metrics):
        keys = list(dict.fromkeys(key for run in runs for key in scalars(run.metrics.get(set_name, {}))))
        keys.sort(key=is_loss)
        bases: dict[tuple, Row] = {}
        rows = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            if base := run.base_metrics.get(set_name):
                cells = [metric_cell(key, base) for key in keys]
                form = run.record["base"].get("quantization")
                title = f"base {portable_name(str(run.record['base'].get('name')))}" + (f" in {form}" if form else "")
                bases.setdefault(tuple(cell["value"] for cell in cells), Row(title, [*cells, ""], "base"))
            cells = [_cell(key, run.metrics.get(set_name, {})) for key in keys]
            rows.append(Row(name, [*cells, str(run.step)], run_look(i), "" if run.finished else "not finished"))
        columns = [*(metric_of(key).title for key in keys), "step"]
        tables.append(Table(columns, [*bases.values(), *rows], set_name))
    return tables
