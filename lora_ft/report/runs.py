"""A run as its files tell it, finished or not: record, log, samples. Imports no torch."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError, ModelError
from lora_ft.core.metrics import split_set_name
from lora_ft.core.storage import read_json


@dataclass(frozen=True)
class Run:
    """What there is to show of a run.

    folder: as the user named it. record: lora_ft.json's, or of the newest checkpoint. lines: the log's. step: whose metrics
    these are; last: the last step that is known of. finished: whether the adapter is there; why: what ended it early.
    metrics, base_metrics: name -> value of each eval set by name, "" where there is one. samples: as samples.json has them.
    """

    folder: Path
    record: dict
    lines: list[dict]
    step: int
    last: int
    finished: bool
    why: str | None = None
    metrics: dict[str, dict] = field(default_factory=dict)
    base_metrics: dict[str, dict] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)


def read_run(folder: Path, record: dict | None = None, why: str | None = None) -> Run:
    """The run whose output is `folder`; with `record`, one that is just ending and whose own record is not there yet.

    Raises:
        ModelError: no run of this tool is there.
        FilesError: its record can't be read or lacks what every record has.
    """
    path = folder / run_folder.RECORD
    checkpoints = run_folder.checkpoints(folder)
    if record is None and path.is_file():
        record = read_json(path, FilesError)
        if record.get("kind") == "checkpoint":
            raise ModelError(f"{folder}: a checkpoint. Name the output of its run: {folder.parent.parent}.")
        if record.get("kind") != "adapter":
            raise ModelError(f"{folder}: holds no run, but a merged model. Name the output of a run.")
    elif record is None:
        if not checkpoints:
            raise ModelError(f"{folder}: no run of this tool is there. Name the output of one: lora-ft report OUT.")
        path = checkpoints[-1] / run_folder.RECORD
        record = read_json(path, FilesError) | {"kind": "unfinished"}
    for name in ("config", "base", "data"):
        if not isinstance(record.get(name), dict):
            raise FilesError(f"{path}: damaged: it has no {name}. Restore it from a copy.")
    finished, lines = record.get("kind") == "adapter", read_log(folder)
    reached = [line["step"] for line in lines] + [run_folder.step_of(c) for c in checkpoints]
    step, metrics = (record.get("step"), record.get("metrics")) if finished else latest_metrics(checkpoints, lines)
    last = record.get("steps") if finished else max(reached, default=0)
    step, last = (value if isinstance(value, int) else 0 for value in (step, last))
    own, base = (split_set_name(found, set_names(record)) for found in (metrics, record.get("base_metrics")))
    return Run(folder, record, lines, step, last, finished, why, own, base, read_samples(folder, step))


def read_log(folder: Path) -> list[dict]:
    """The log's lines that are whole, numbers that are finite."""
    lines = []
    try:
        text = (folder / run_folder.LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for text_line in text.splitlines():
        try:
            line = json.loads(text_line)
        except ValueError:
            continue  # the line that a crash cut
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append({k: v for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)})
    return lines


def latest_metrics(checkpoints: list[Path], lines: list[dict]) -> tuple[int, dict]:
    """The step of the last evaluation and its metrics: a checkpoint's, which has all, or else the log's."""
    evaluated = [line for line in lines if any(k.startswith("eval_") and k.endswith("loss") for k in line)]
    step = evaluated[-1]["step"] if evaluated else 0
    for checkpoint in reversed(checkpoints):
        if run_folder.step_of(checkpoint) == step:
            metrics = read_json(checkpoint / run_folder.RECORD, FilesError).get("metrics")
            if metrics:
                return step, metrics
    names = evaluated[-1].items() if evaluated else ()
    return step, {name.removeprefix("eval_"): value for name, value in names if name.startswith("eval_")}


def set_names(record: dict) -> list[str]:
    """The names of a run's eval sets; none where there is but one, without a name."""
    data = record["config"].get("data")
    sets = data.get("eval") if isinstance(data, dict) else None
    return list(sets) if isinstance(sets, dict) else []


def read_samples(folder: Path, step: int) -> list[dict]:
    """The samples of this very step."""
    path = folder / run_folder.SAMPLES
    if not run_folder.is_own_report(path):
        return []
    found = read_json(path, FilesError)
    samples = found.get("samples") if found.get("step") == step else None
    return [s for s in samples if isinstance(s, dict)] if isinstance(samples, list) else []
