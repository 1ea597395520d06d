"""A run's figures as text: what it took, its data, its settings, what it takes to make it again."""

import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from lora_ft.report.runs import Run, set_names


def spent(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def figures(run: Run) -> list[tuple[str, str]]:
    """What a run took and made, each as (what, how much)."""
    record, machine = run.record, run.record.get("machine") or {}
    last: dict = {}
    for line in run.lines:
        last |= line
    speeds = [line["tokens_per_second"] for line in run.lines if "tokens_per_second" in line]
    planned = record.get("planned_steps") or run.last
    device = ", ".join(
        f"{v} {k}" if k != "device" else str(v) for k, v in machine.items() if (k, v) != ("processes", 1)
    )
    found = [
        ("steps", f"{run.last:,}" if run.last == planned else f"{run.last:,} of {planned:,}"),
        ("epochs", f"{last['epoch']:.2f}" if "epoch" in last else ""),
        ("training and its evaluations", spent(last["seconds"]) if "seconds" in last else ""),
        ("evaluation of the base", spent(record["base_seconds"]) if "base_seconds" in record else ""),
        ("tokens per second, median", f"{statistics.median(speeds):,.0f}" if speeds else ""),
        ("peak memory", f"{last['peak_memory_mb']:,.0f} MiB" if "peak_memory_mb" in last else ""),
        ("trainable parameters", f"{record['trainable_parameters']:,}" if "trainable_parameters" in record else ""),
        ("device", device),
    ]
    return [(what, text) for what, text in found if text]


DATA = {
    "rows": "rows read",
    "used": "rows used",
    "examples": "examples",
    "tokens": "tokens",
    "supervised": "of them supervised",
    "longest": "longest example, tokens",
    "truncated": "examples truncated",
    "dropped": "rows dropped: nothing supervised was left",
    "merged": "examples whose tokens merge across the prompt's end",
    "skipped_count": "bad rows skipped",
    "content": "SHA-256 of the sources' content",
    "sha256": "SHA-256 with template, tokenizer and settings",
}


def data_table(run: Run) -> dict[str, Any]:
    """The data's statistics and fingerprints: columns train and eval, a row a figure."""
    data, config = run.record["data"], run.record["config"].get("data") or {}
    named = {f"eval {name}": name for name in set_names(run.record)}
    sets = {name: about for name, about in data.items() if isinstance(about, dict) and not (named and name == "eval")}
    sets |= {title: (data.get("eval") or {}).get(name) or {} for title, name in named.items()}
    config = config | {title: config["eval"][name] for title, name in named.items()}
    rows = []
    for key, title in DATA.items():
        values = [about.get(key) for about in sets.values()]
        if any(values):
            rows.append((title, [f"{v:,}" if isinstance(v, int) else str(v or "") for v in values]))
    sources = [", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in (config.get(name) for name in sets)]
    skipped = [str(message) for about in sets.values() for message in about.get("skipped") or []]
    return {"names": list(sets), "rows": [("source", sources), *rows], "skipped": skipped}


def config_text(run: Run) -> str:
    return yaml.safe_dump(run.record["config"], sort_keys=False, allow_unicode=True)


def origin(run: Run) -> list[tuple[str, str]]:
    """Base, tokenizer, seed and versions: what it takes to make the run again."""
    record, base = run.record, run.record["base"]
    versions = ", ".join(f"{name} {number}" for name, number in (record.get("versions") or {}).items())
    named = [
        ("base", base.get("name")),
        ("revision", base.get("revision")),
        ("fingerprint of its weights", base.get("fingerprint")),
        ("computed in", base.get("dtype")),
        ("tokenizer", record.get("tokenizer")),
        ("seed", record.get("seed")),
        ("versions", versions),
    ]
    return [(what, str(value)) for what, value in named if value not in (None, "")]


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that aren't the same in all runs, each with every run's value."""
    flat = []
    for run in runs:
        found: dict[str, object] = {}
        for section, value in run.record["config"].items():
            inner = value if isinstance(value, dict) else {"": value}
            found |= {f"{section}.{k}".rstrip("."): v for k, v in inner.items()}
        flat.append(found)
    names = dict.fromkeys(name for found in flat for name in found)
    values = {name: [_value(found.get(name)) for found in flat] for name in names}
    return [(name, texts) for name, texts in values.items() if len(set(texts)) > 1]


def _value(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
