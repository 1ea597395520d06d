"""What a run left in its output folder, finished or not: record, log, samples. Imports no torch."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError, ModelError
from lora_ft.core.metrics import is_number, split_set_name
from lora_ft.core.names import template_columns
from lora_ft.core.storage import read_json, wrong_entries

NEEDED: dict[str, Any] = {
    **dict.fromkeys(("base", "data", "config", "config.adapter", "config.data"), dict),
    "base.name": str,
    "config.data.prompt": str | None,
    "config.data.chat_template_kwargs": dict | None,
}
NEEDED_OF: dict[str, dict[str, Any]] = {  # in config.adapter, by its method
    "lora": {"targets": list, "modules": list, "rank": int, "alpha": int | float},
    "bottleneck": {"bottleneck_size": int, "placement": str},
    "prompt": {"virtual_tokens": int},
}

CHOICE_OF_ROWS = ("train", "eval", "max_train_examples", "max_eval_examples")  # in config.data


@dataclass(frozen=True)
class RunData:
    """The data of a run's report.

    record: the content of lora_ft.json; of an unfinished run, the newest checkpoint's. step: the step that `metrics` belong
    to. last_step: the last one that was trained, as far as the files show. finished: the folder holds the run's adapter.
    stop_reason: why the run has just ended early. metrics, base_metrics: eval set -> metric -> value; an unnamed set is "".
    samples, rows: of samples.json, answers to a few eval rows, and rows of classifications, see `describe_rows`.
    """

    folder: Path
    record: dict
    log: list[dict]
    step: int
    last_step: int
    finished: bool
    stop_reason: str | None
    metrics: dict[str, dict]
    base_metrics: dict[str, dict]
    samples: list[dict]
    rows: list[dict] = field(default_factory=list)


def read_run_data(folder: Path, record: dict | None = None, stop_reason: str | None = None) -> RunData:
    """The data of the run whose output is `folder`. `record` is that of a run which has not written its own yet.

    Raises:
        ModelError: the folder does not contain a run.
        FilesError: its record is damaged.
    """
    path = folder / run_folder.RECORD
    checkpoints = run_folder.checkpoints(folder)
    if record is None and (record := run_folder.read_record(folder, FilesError)):
        if record.get("kind") == "checkpoint":
            raise ModelError(f"{folder}: is a checkpoint. Give the output folder of its run: {folder.parent.parent}.")
        if record.get("kind") != "adapter":
            what = "a merged model" if record.get("kind") == "merged" else "made of other adapters"
            raise ModelError(f"{folder}: is {what} and holds no run. Give the output folder of a run.")
    elif record is None:
        if not checkpoints:
            problem = "holds no run" if folder.is_dir() else "no such folder"
            raise ModelError(f"{folder}: {problem}. Give the output folder of one: lora-ft report OUT.")
        path = checkpoints[-1] / run_folder.RECORD
        record = (run_folder.read_record(checkpoints[-1], FilesError) or {}) | {"kind": "unfinished"}
    if wrong := _wrong(record):
        raise FilesError(f"{path}: damaged: {wrong[0]} is missing, or not what it should be. Restore it from a copy.")
    finished, log = record.get("kind") == "adapter", read_log(folder)
    if finished:
        step, metrics, last = record.get("step"), record.get("metrics"), record.get("steps")
    else:
        step, metrics = _last_evaluation(checkpoints, log)
        last = max([line["step"] for line in log] + [run_folder.step_of(c) for c in checkpoints], default=0)
    step, last = (value if isinstance(value, int) else 0 for value in (step, last))
    own, base = (split_set_name(found, eval_set_names(record)) for found in (metrics, record.get("base_metrics")))
    return RunData(folder, record, log, step, last, finished, stop_reason, own, base, *_read_samples(folder, step))


def _wrong(record: dict) -> list[str]:
    """Entries that a report needs and the record lacks or has in another form; `read_record` has checked the others."""
    if wrong := wrong_entries(record, NEEDED):
        return wrong
    config = record["config"]
    method = config["adapter"].get("method", "lora")
    if wrong := wrong_entries(config["adapter"], NEEDED_OF.get(method, {})):
        return [f"config.adapter.{name}" for name in wrong]
    try:
        template_columns(config["data"].get("prompt") or "")
    except ValueError:
        return ["config.data.prompt"]
    return []


def read_log(folder: Path) -> list[dict]:
    """The complete lines of a run's log, with the values that are numbers."""
    try:
        text = (folder / run_folder.LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for text_line in text.splitlines():
        try:
            line = json.loads(text_line)
        except (ValueError, RecursionError):
            continue  # cut by a crash
        if isinstance(line, dict) and isinstance(line.get("step"), int) and is_number(line["step"]):
            lines.append({k: v for k, v in line.items() if is_number(v)})
    return lines


def evaluation_steps(log: list[dict]) -> list[int]:
    """The steps, from 1, after which the run was evaluated."""
    return [line["step"] for line in log if line["step"] and any(key.startswith("eval_") for key in line)]


def eval_set_names(record: dict) -> list[str]:
    """The names of a run's eval sets; [] for a single set without a name."""
    data = record["config"].get("data")
    sets = data.get("eval") if isinstance(data, dict) else None
    return list(sets) if isinstance(sets, dict) else []


def same_eval_data(a: RunData, b: RunData) -> bool:
    """Whether two runs were scored on the same rows, encoded in the same way, as far as their records tell."""
    if [e.get("sha256") for e in _eval_entries(a)] == [e.get("sha256") for e in _eval_entries(b)]:
        return True
    # that hash covers the run's seed too, which matters only where it chose rows
    return not _has_drawn_rows(a) and not _has_drawn_rows(b) and _encoding(a) == _encoding(b)


def _eval_entries(run: RunData) -> list[dict]:
    """What the record says of each eval set."""
    data = run.record["data"].get("eval") or {}
    return [data.get(name) or {} for name in eval_set_names(run.record)] or [data]


def _has_drawn_rows(run: RunData) -> bool:
    """Whether the seed chose eval rows: by holding them out of train, or as a sample."""
    sets = run.record["config"]["data"].get("eval")
    held_out = [is_number(amount) for amount in (sets.values() if isinstance(sets, dict) else [sets])]
    return any(held_out) or any(entry.get("not_sampled") != 0 for entry in _eval_entries(run))


def _encoding(run: RunData) -> tuple:
    """The content of the eval files and all that decides how it is encoded."""
    settings = {name: value for name, value in run.record["config"]["data"].items() if name not in CHOICE_OF_ROWS}
    contents = [entry.get("content") for entry in _eval_entries(run)]
    return contents, settings, run.record.get("tokenizer"), run.record.get("chat_template")


def _last_evaluation(checkpoints: list[Path], log: list[dict]) -> tuple[int, dict]:
    """(step, metrics) of an unfinished run's last evaluation: from its checkpoint, which has all, else from the log."""
    lines = [line for line in log if any(key.startswith("eval_") and key.endswith("loss") for key in line)]
    if not lines:
        return 0, {}
    step = lines[-1]["step"]
    for checkpoint in [c for c in checkpoints if run_folder.step_of(c) == step]:
        if metrics := read_json(checkpoint / run_folder.RECORD, FilesError).get("metrics"):
            return step, metrics
    return step, {key.removeprefix("eval_"): value for key, value in lines[-1].items() if key.startswith("eval_")}


def eval_examples(record: dict, set_name: str) -> int:
    """The number of examples of an eval set; 0 if it is unknown."""
    data = record["data"].get("eval") or {}
    return max(0, (data.get(set_name) or {} if set_name else data).get("examples") or 0)


def _read_samples(folder: Path, step: int) -> tuple[list[dict], list[dict]]:
    """The samples and rows in samples.json, if they are of this step."""
    path = folder / run_folder.SAMPLES
    content = read_json(path, FilesError) if run_folder.is_own_report(path) else {}
    lists = [content.get(key) if content.get("step") == step else None for key in ("samples", "rows")]
    samples, rows = ([of for of in found if isinstance(of, dict)] if isinstance(found, list) else [] for found in lists)
    return [sample for sample in samples if isinstance(sample.get("cut", []), list)], rows
