"""A run's facts as text: its cost, its data, its settings, and what is needed to repeat it."""

import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from lora_ft.core.metrics import is_number
from lora_ft.report.runs import RunData, eval_set_names


def format_duration(seconds: float) -> str:
    """`95 s`, `12.5 min`, `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run_figures(run: RunData) -> list[tuple[str, str]]:
    """Length, time, speed, memory and machine of a run, each as (title, text)."""
    record, machine = run.record, run.record.get("machine") or {}
    last = {key: value for line in run.log for key, value in line.items()}
    speeds = [line["tokens_per_second"] for line in run.log if "tokens_per_second" in line]
    planned = record.get("planned_steps") or run.last_step
    parts = [str(v) if k == "device" else f"{v} {k}" for k, v in machine.items() if (k, v) != ("processes", 1)]
    figures = [
        ("steps", f"{run.last_step:,}" if run.last_step == planned else f"{run.last_step:,} of {planned:,}"),
        ("epochs", f"{last['epoch']:.2f}" if "epoch" in last else ""),
        ("training with evaluations", format_duration(last["seconds"]) if "seconds" in last else ""),
        (
            "evaluation of the base",
            format_duration(record["base_seconds"]) if is_number(record.get("base_seconds")) else "",
        ),
        ("tokens per second, median", f"{statistics.median(speeds):,.0f}" if speeds else ""),
        ("peak memory", f"{last['peak_memory_mb']:,.0f} MiB" if "peak_memory_mb" in last else ""),
        ("trainable parameters", f"{trained:,}" if (trained := record.get("trainable_parameters")) else ""),
        ("device", ", ".join(parts)),
    ]
    return [(title, text) for title, text in figures if text]


def rates_tried(record: dict) -> list[tuple[str, list[str]]]:
    """With `train.learning_rate: auto`: each rate, with its loss on held-out rows, and the part of the steps it had then.

    The chosen one comes last, unless it is one of them, as in runs of an earlier version.
    """
    chosen, rows = record["config"].get("train", {}).get("learning_rate"), []
    for tried in (record.get("learning_rate") or {}).get("tried", []):
        loss = "failed" if tried["loss"] is None else f"{tried['loss']:.4f}"
        name = f"{tried['learning_rate']:g}" + (" (chosen)" if tried["learning_rate"] == chosen else "")
        rows.append((name, [loss, f"1/{round(1 / tried['part'])}"]))
    if rows and not any(name.endswith("(chosen)") for name, _ in rows):
        rows.append((f"{chosen:g} (chosen)", ["", "this run"]))
    return rows


DATA_TITLES = {
    "rows": "rows read",
    "used": "rows used",
    "examples": "examples",
    "tokens": "tokens",
    "supervised": "supervised tokens",
    "longest": "longest example, tokens",
    "truncated": "examples truncated",
    "dropped": "rows dropped: no supervised token left",
    "merged": "examples with a token across the prompt's end",
    "skipped_count": "bad rows skipped",
}
HASH_TITLES = {"content": "SHA-256 of the sources", "sha256": "SHA-256 with template, tokenizer and settings"}


def data_table(run: RunData) -> dict[str, Any]:
    """Statistics of the data: a column for train and for each eval set, a row per figure."""
    config, sets = run.record["config"].get("data") or {}, _data_sets(run)
    config = config | {f"eval {name}": config["eval"][name] for name in eval_set_names(run.record)}
    rows = []
    for key, title in DATA_TITLES.items():
        values = [of.get(key) for of in sets.values()]
        if any(values):
            rows.append((title, [f"{v:,}" if isinstance(v, int) else str(v or "") for v in values]))
    sources = [", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in (config.get(name) for name in sets)]
    skipped = [str(message) for of in sets.values() for message in of.get("skipped") or []]
    return {"names": list(sets), "rows": [("source", sources), *rows], "skipped": skipped}


def _data_sets(run: RunData) -> dict[str, dict]:
    """Title of a set, such as `eval dev`, -> its part of the record."""
    data, names = run.record["data"], eval_set_names(run.record)
    sets = {name: of for name, of in data.items() if isinstance(of, dict) and not (names and name == "eval")}
    return sets | {f"eval {name}": (data.get("eval") or {}).get(name) or {} for name in names}


def config_text(config: dict) -> str:
    """A config as YAML."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def provenance(run: RunData) -> list[tuple[str, str]]:
    """Base, seed and versions: what is needed to repeat the run. Each as (title, text)."""
    record, base = run.record, run.record["base"]
    facts = [
        ("base", base.get("name")),
        ("revision", base.get("revision")),
        ("computed in", base.get("dtype")),
        ("seed", record.get("seed")),
        ("versions", ", ".join(f"{name} {number}" for name, number in (record.get("versions") or {}).items())),
    ]
    return [(title, str(value)) for title, value in facts if value not in (None, "")]


def hashes(run: RunData) -> list[tuple[str, str]]:
    """The hashes by which base, tokenizer and data are recognized. Each as (title, text)."""
    facts = [("weights of the base", run.record["base"].get("fingerprint")), ("tokenizer", run.record.get("tokenizer"))]
    for name, of in _data_sets(run).items():
        facts += [(f"{name}: {title}", of.get(key)) for key, title in HASH_TITLES.items()]
    return [(title, str(value)) for title, value in facts if value]


def differing_settings(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, each with every run's value as YAML."""
    configs = []
    for run in runs:
        settings: dict[str, object] = {}
        for section, value in run.record["config"].items():
            inner = value if isinstance(value, dict) else {"": value}
            settings |= {f"{section}.{key}".rstrip("."): v for key, v in inner.items()}
        configs.append(settings)
    names = dict.fromkeys(name for settings in configs for name in settings)
    values = {name: [yaml_value(settings.get(name)) for settings in configs] for name in names}
    return [(name, texts) for name, texts in values.items() if len(set(texts)) > 1]


def yaml_value(value: object) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
