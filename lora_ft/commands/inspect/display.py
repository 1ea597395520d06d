"""An inspected adapter in the terminal, in 80 columns, and as a page. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_ft.commands.inspect.adapter import Adapter
from lora_ft.commands.inspect.measures import Module, Overlap, grouped, together
from lora_ft.core.messages import echo, listed, printable
from lora_ft.core.metrics import format_metric, scalars
from lora_ft.core.run_folder import RECORD
from lora_ft.report.render import render, write_page

Table = tuple[list[str], list[list[str]]]  # headings and rows
Inspected = tuple[Adapter, list[Module]]
MOST_COLUMNS = 9  # of the map, in a terminal


def facts(adapter: Adapter) -> list[tuple[str, str]]:
    """What the config and the record say, each as (title, text)."""
    config, record = adapter.trained.adapter_config, adapter.trained.record
    base, data = record.get("base") or {}, record.get("data") or {}
    trained, settings = data.get("train") or {}, (record.get("config") or {}).get("data") or {}
    elements = sum(A.size + B.size for A, B in adapter.tensors.values())
    scores, before = (scalars(record.get(key) or {}) for key in ("metrics", "base_metrics"))
    scored = [
        f"{key} {format_metric(key, value)}" + (f" (base {format_metric(key, before[key])})" if key in before else "")
        for key, value in scores.items()
    ]
    named = settings.get("train")
    sources = listed(list(map(str, named)), 3) if isinstance(named, list) else str(named)
    parts = (record.get("made_of") or {}).get("parts") or []
    made = [f"{part.get('weight')} x {part.get('name')}" for part in parts if isinstance(part, dict)]
    versions = ", ".join(f"{name} {number}" for name, number in (record.get("versions") or {}).items())
    rank, alpha = config.get("r"), config.get("lora_alpha")
    stated = [
        ("adapter", f"rank {rank}, lora_alpha {alpha}, {len(adapter.modules)} modules, {elements:,} parameters"),
        ("base", str(adapter.trained.base_name or "not named")),
        ("fingerprint", (base.get("fingerprint") or "")[:16]),
        ("data", f"{sources}: {examples:,} examples" if isinstance(examples := trained.get("examples"), int) else ""),
        ("scores", ", ".join(scored)),
        ("made of", ", ".join(made)),
        ("trained", f"step {record['step']:,}, seed {record.get('seed')}" if record.get("step") else ""),
        ("versions", versions or (f"peft {config['peft_version']}" if config.get("peft_version") else "")),
        ("record", "" if record else f"none that can be read ({RECORD})"),
    ]
    return [(title, text) for title, text in stated if text]


def role_table(modules: Sequence[Module]) -> Table:
    """A row per role, and one for all."""
    counted = any(m.intruders is not None for m in modules)
    headings = [
        "",
        "modules",
        "rank",
        "effective",
        "99%",
        "change",
        "most",
        "share",
        *(["intruders"] if counted else []),
    ]
    groups = grouped(modules)
    rows = []
    for title, of in [*groups.items(), *([("all", list(modules))] if len(groups) > 1 else [])]:
        ranks = sorted({m.rank for m in of})
        most = max(of, key=lambda m: m.ratio or m.norm)
        where = "" if most.layer is None else f" in {most.layer}"
        rows.append(
            [
                title,
                str(len(of)),
                f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
                f"{fmean(m.effective_rank for m in of):.1f}",
                f"{fmean(m.rank_99 for m in of):.1f}",
                percent(together(of)),
                percent(most.ratio) + (where if most.ratio is not None else ""),
                f"{sum(m.share for m in of):.1%}",
                *([str(sum(m.intruders or 0 for m in of))] if counted else []),
            ]
        )
    return headings, rows


def layer_map(modules: Sequence[Module]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """The roles, and for each layer |s B A| / |W| of every role; |s B A| alone where no |W| is known."""
    groups = grouped(m for m in modules if m.layer is not None)
    layers = sorted({m.layer for m in modules if m.layer is not None})
    known = any(m.ratio is not None for m in modules)

    def value(of: list[Module]) -> float | None:
        return (together(of) if known else sum(m.norm**2 for m in of) ** 0.5) if of else None

    rows = [(str(layer), [value([m for m in of if m.layer == layer]) for of in groups.values()]) for layer in layers]
    return list(groups), rows


def overlap_table(overlaps: Sequence[Overlap]) -> Table:
    """A row per role: means over its modules."""
    headings = ["", "modules", "cosine", "columns of B", "by chance", "rows of A", "by chance"]
    groups = grouped(overlaps)
    rows = []
    for title, of in [*groups.items(), *([("all", list(overlaps))] if len(groups) > 1 else [])]:
        names = ("cosine", "columns", "chance_columns", "rows", "chance_rows")
        rows.append([title, str(len(of)), *(f"{fmean(getattr(entry, name) for entry in of):.3f}" for name in names)])
    return headings, rows


def show(inspected: Sequence[Inspected], overlaps: Sequence[Overlap]) -> None:
    """Print facts, findings and tables on stdout."""
    for adapter, modules in inspected:
        echo(printable(str(adapter.trained.folder), 500))
        for title, text in facts(adapter):
            echo(f"  {title:11} {printable(text, 500)}")
        for finding in sorted(adapter.findings, key=lambda f: not f.problem):
            echo(f"{'problem' if finding.problem else 'note'} ({finding.kind}): {printable(finding.text, 1000)}")
        if not any(finding.problem for finding in adapter.findings):
            echo("no problem found")
        if modules:
            echo(f"\nby role; change: {meaning(modules)}")
            echo_table(role_table(modules))
            roles, rows = layer_map(modules)
            if len(rows) > 1 and len(roles) <= MOST_COLUMNS:
                echo("\nchange by layer")
                as_text = percent if any(m.ratio is not None for m in modules) else number
                echo_table((["layer", *roles], [[layer, *map(as_text, values)] for layer, values in rows]))
        echo("")
    if len(inspected) > 1:
        echo("overlap, 1 where one lies in the other; means over the modules that both adapt")
        echo_table(overlap_table(overlaps))


def meaning(modules: Sequence[Module]) -> str:
    """What a change is measured by."""
    return "|s B A| / |W|" if any(m.ratio is not None for m in modules) else "unknown, as |W| is; below, |s B A|"


def write_html(path: Path, inspected: Sequence[Inspected], overlaps: Sequence[Overlap]) -> None:
    """Write a page with the same tables, and each adapter's map of layers and roles. Raises as `write_page`."""
    adapters: list[dict[str, Any]] = []
    for adapter, modules in inspected:
        roles, rows = layer_map(modules)
        most = max((v for _, values in rows for v in values if v is not None), default=0) or 1
        as_text = percent if any(m.ratio is not None for m in modules) else number
        cells = [(layer, [(as_text(v), round((v or 0) / most, 3)) for v in values]) for layer, values in rows]
        adapters.append(
            {
                "name": str(adapter.trained.folder),
                "facts": facts(adapter),
                "findings": adapter.findings,
                "meaning": meaning(modules),
                "table": role_table(modules) if modules else None,
                "roles": roles,
                "map": cells,
            }
        )
    title = " and ".join(entry["name"] for entry in adapters)
    both = overlap_table(overlaps) if overlaps else None
    write_page(path, render("inspect.html", title=f"{title}: lora-ft inspect", adapters=adapters, overlap=both))


def percent(ratio: float | None) -> str:
    """`2.31%`; `-` if it is not known."""
    return "-" if ratio is None else f"{ratio:.3g}x" if ratio >= 10 else f"{100 * ratio:.3g}%"


def number(value: float | None) -> str:
    """`0.0231`; `-` if there is none."""
    return "-" if value is None else f"{value:.3g}"


def echo_table(table: Table) -> None:
    """Print a table with its first column to the left and the others to the right."""
    lines = [list(map(printable, line)) for line in (table[0], *table[1])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        echo("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
