"""What a comparison found, as figures: means over seeds with intervals, costs. Imports no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.core.metrics import scalars, split_set_name
from lora_ft.report.runs import read_log, set_names

# Student's t, 97.5%, of 1, 2, ... degrees of freedom; from a table, as scipy would be a large guest for one column of it
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass
class Found:
    """Of one variant: what was chosen for it and by which scores, its finished runs by seed, and what went wrong."""

    name: str
    settings: dict[str, str]
    tuned: dict[str, str] = field(default_factory=dict)
    tried: list[dict] = field(default_factory=list)  # {"settings": ..., "score": None where it failed}
    runs: dict[int, dict] = field(default_factory=dict)  # seed -> {"output": folder, "record": its record}
    refused: str = ""
    exit_code: int = 0  # of the run that was refused
    latency: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        """Figures for machines; the keys of `metrics` are eval sets ("" for the one without a name)."""
        about: dict = {"name": self.name, "settings": self.settings, "tuned": self.tuned, "tried": self.tried}
        if self.refused:
            about["refused"] = self.refused
        if self.runs:
            about |= costs(list(self.runs.values()))
            about["metrics"] = metrics([run["record"] for run in self.runs.values()])
            about["runs"] = {str(seed): run["output"] for seed, run in self.runs.items()}
        return about | ({"latency": self.latency} if self.latency else {})


def metrics(records: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """Eval set -> metric -> its values by run, their mean and the mean's 95% interval (none of a single run)."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for name, of in split_set_name(record.get("metrics"), set_names(record)).items():
            for metric, value in scalars(of).items():
                found.setdefault(name, {}).setdefault(metric, []).append(value)
    return {name: {metric: spread(values) for metric, values in of.items()} for name, of in found.items()}


def spread(values: Sequence[float]) -> dict:
    """Mean and 95% interval by Student's t: what the seed changes, not the sampling of the eval data."""
    mean, n = statistics.mean(values), len(values)
    about: dict = {"mean": mean, "values": list(values)}
    if n > 1:
        t = T[n - 2] if n - 2 < len(T) else 1.96
        half = t * statistics.stdev(values) / math.sqrt(n)
        about["ci95"] = [mean - half, mean + half]
    return about


def costs(runs: Sequence[dict]) -> dict:
    """What the runs of a variant took: medians over them. Peak memory is the highest."""
    record, outputs = runs[0]["record"], [Path(run["output"]) for run in runs]
    logs = [[line for line in read_log(output) if "tokens_per_second" in line] for output in outputs]
    speeds = [statistics.median(line["tokens_per_second"] for line in log) for log in logs if log]
    steps = [log[-1]["tokens"] / log[-1]["step"] for log in logs if log]
    weights = [name for name in record.get("files") or {} if name.endswith(".safetensors")]
    about = {
        "trainable_parameters": record["trainable_parameters"],
        "trainable_share": record["trainable_parameters"] / record["parameters"],
        "bytes_on_disk": sum((outputs[0] / name).stat().st_size for name in weights),
    }
    if speeds:
        about |= {
            "tokens_per_second": round(statistics.median(speeds), 1),
            "seconds_per_step": round(statistics.median(t / s for t, s in zip(steps, speeds, strict=True)), 4),
            "peak_memory_mb": max(line["peak_memory_mb"] for log in logs for line in log),
        }
    return about


def base_metrics(found: Sequence[Found]) -> dict[str, dict[str, float]]:
    """The base's own scores, from the one run that was asked for them."""
    for variant in found:
        for run in variant.runs.values():
            if scores := run["record"].get("base_metrics"):
                return {name: scalars(of) for name, of in split_set_name(scores, set_names(run["record"])).items()}
    return {}


def shown_metrics(sets: dict[str, dict]) -> dict[str, list[str]]:
    """Of each eval set the metrics that a table shows: not perplexity, which says what the loss does."""
    return {name: [metric for metric in of if metric != "perplexity"] for name, of in sets.items()}
