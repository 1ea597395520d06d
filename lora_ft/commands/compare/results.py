"""What a comparison measured: scores over seeds with intervals, and costs, per variant. Imports no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.commands.compare.runs import RunFailed
from lora_ft.commands.compare.variants import Variant
from lora_ft.config.schema import Config
from lora_ft.config.tuning import Score
from lora_ft.core.intervals import student_t
from lora_ft.core.metrics import VS_BASE, scalars, split_set_name
from lora_ft.report.runs import eval_set_names, read_log


@dataclass(eq=False)
class Candidate:
    """A point of the tuning grid and the config of its run. score: after a `stage`, a part of its steps."""

    settings: dict[str, str]
    config: Config
    stage: float | None = None
    score: Score = None


@dataclass
class VariantResult:
    """The results of a variant so far.

    candidates: of tuning. left: those that have not been dropped, best first. records: seed -> the record of each finished run.
    failure: why the variant can't be trained here. latency: as benchmarks/latency.py has measured its first run's weights.
    """

    variant: Variant
    candidates: list[Candidate] = field(default_factory=list)
    left: list[Candidate] = field(default_factory=list)
    records: dict[int, dict] = field(default_factory=dict)
    failure: RunFailed | None = None
    latency: dict = field(default_factory=dict)

    @property
    def tuned(self) -> dict[str, str]:
        """The settings chosen by tuning."""
        return self.left[0].settings if self.left else {}

    @property
    def weights_hash(self) -> str:
        """The SHA-256 of the first run's weights."""
        files = next(iter(self.records.values()), {}).get("files") or {}
        return next((entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")), "")

    def as_dict(self) -> dict:
        """For compare.json; the keys of `metrics` are eval sets, "" for a single one without a name."""
        variant = self.variant
        tried = [
            {"settings": c.settings, "part": c.stage, "score": c.score and c.score[0]}
            for c in self.candidates
            if c.stage
        ]
        entry: dict = {"name": variant.name, "settings": variant.settings, "tuned": self.tuned, "tried": tried}
        if self.failure:
            entry["refused"] = str(self.failure)
        if records := list(self.records.values()):
            entry |= costs(records) | {"metrics": metrics_over_seeds(records)}
            entry["vs_base"] = compared_with_base(records[0])
            entry["runs"] = {str(seed): record["config"]["output"] for seed, record in self.records.items()}
        return entry | ({"latency": self.latency} if self.latency else {})


def metrics_over_seeds(records: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """Eval set -> metric -> `mean_interval` of its values in these runs."""
    values: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for name, metrics in split_set_name(record.get("metrics"), eval_set_names(record)).items():
            for metric, value in scalars(metrics).items():
                values.setdefault(name, {}).setdefault(metric, []).append(value)
    return {name: {metric: mean_interval(v) for metric, v in of.items()} for name, of in values.items()}


def compared_with_base(record: dict) -> dict[str, dict[str, dict]]:
    """Eval set -> metric's key + VS_BASE -> the run's comparison with the base on the same rows."""
    sets = split_set_name(record.get("metrics"), eval_set_names(record))
    return {name: {key: value for key, value in of.items() if key.endswith(VS_BASE)} for name, of in sets.items()}


def mean_interval(values: Sequence[float]) -> dict:
    """Mean, values and, of at least two, the mean's 95% interval by Student's t: the effect of the seed alone."""
    mean, n = statistics.mean(values), len(values)
    entry: dict = {"mean": mean, "values": list(values)}
    if n > 1:
        half = student_t(n - 1) * statistics.stdev(values) / math.sqrt(n)
        entry["ci95"] = [mean - half, mean + half]
    return entry


def costs(records: Sequence[dict]) -> dict:
    """Parameters, bytes, speed and seconds per step (medians over a variant's runs) and peak memory (MiB, the highest).

    Time and memory are those of runs that were trained alone.
    """
    alone = [record for record in records if "runs_together" not in record["machine"]]
    record, outputs = records[0], [Path(record["config"]["output"]) for record in alone]
    logs = [[line for line in read_log(output) if "tokens_per_second" in line] for output in outputs]
    logs = [log for log in logs if log]
    weights = [name for name in record.get("files") or {} if name.endswith(".safetensors")]
    entry = {
        "trainable_parameters": record["trainable_parameters"],
        "trainable_share": record["trainable_parameters"] / record["parameters"],
        "bytes_on_disk": sum(record["files"][name]["size"] for name in weights),
    }
    if logs:
        speeds = [statistics.median(line["tokens_per_second"] for line in log) for log in logs]
        seconds = [log[-1]["tokens"] / log[-1]["step"] / speed for log, speed in zip(logs, speeds, strict=True)]
        entry |= {
            "tokens_per_second": round(statistics.median(speeds), 1),
            "seconds_per_step": round(statistics.median(seconds), 4),
            "peak_memory_mb": max(line["peak_memory_mb"] for log in logs for line in log),
        }
    return entry


def base_metrics(results: Sequence[VariantResult]) -> dict[str, dict[str, float]]:
    """Eval set -> metrics of the base, from the one run that has scored it."""
    for result in results:
        for record in result.records.values():
            if metrics := record.get("base_metrics"):
                return {name: scalars(of) for name, of in split_set_name(metrics, eval_set_names(record)).items()}
    return {}
