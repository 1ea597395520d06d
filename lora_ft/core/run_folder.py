"""The names in a run's output folder, and which of them are there. lora_ft.training.output writes and removes them.

output/                 the adapter of a finished run; its record, lora_ft.json, is written last
output/log.jsonl        one line per logged step
output/tensorboard/     TensorBoard's files
output/report.html, curves.svg, samples.json
output/checkpoints/step-N/
"""

import re
from pathlib import Path
from typing import Any

from lora_ft.core.errors import FilesError, ModelError, UserError
from lora_ft.core.storage import read_json, verify_manifest

RECORD, LOG = "lora_ft.json", "log.jsonl"
REPORT, CURVES, SAMPLES = "report.html", "curves.svg", "samples.json"
REPORTS = (REPORT, CURVES, SAMPLES, "curves.png")  # curves.png: of an earlier version
TEMPLATE = "chat_template.jinja"  # that the run was trained with, if it was trained on chats
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md", TEMPLATE)
MODEL_FILES = (  # of full fine-tuning, whose output is a complete model
    *("model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
UNHASHED = (LOG, "tensorboard", *REPORTS)  # listed in an adapter's manifest by name only


# The types of what is read from a record, where it has them and they are not null
RECORD_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("base", "config", "data", "versions", "machine", "metrics", "base_metrics", "slices", "files"), dict
    ),
    **dict.fromkeys(("made_of", "learning_rate"), dict),
    **dict.fromkeys(("config.adapter", "config.data", "config.train", "config.model", "data.eval"), dict),
    **dict.fromkeys(("base.name", "base.revision", "base.fingerprint", "base.dtype"), str),
    **dict.fromkeys(("kind", "tokenizer", "chat_template", "config.adapter.method"), str),
    **dict.fromkeys(("step", "steps", "planned_steps", "parameters", "trainable_parameters"), int),
    **dict.fromkeys(("config.adapter.targets", "config.adapter.modules", "config.adapter.add_tokens"), list),
    **dict.fromkeys(("config.adapter.rank", "config.adapter.alpha", "base_seconds"), int | float),
    "config.data.label_names": dict,
}
DATA_TYPES: dict[str, Any] = {  # of what a record has of a data set; the others are counts
    **dict.fromkeys(("skipped", "notes"), list),
    **dict.fromkeys(("turns", "turn_ends", "files"), dict),
    **dict.fromkeys(("content", "sha256", "texts"), str),
}
TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", float: "a number", int: "an integer"}


def read_record(folder: Path, error: type[UserError] = ModelError) -> dict[str, Any] | None:
    """The record of a run, a checkpoint or a merged model, not verified; None if there is none.

    Raises:
        error: it is damaged, or an entry has another type than RECORD_TYPES.
    """
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD, error)
    for name, kind in RECORD_TYPES.items():
        section, _, key = name.rpartition(".")
        parent: Any = record
        for part in filter(None, section.split(".")):
            parent = parent.get(part) or {}
        _check_type(folder / RECORD, name, parent.get(key), kind, error)
    for name in [name for name in ("base", "config") if name in record and record[name] is None]:
        raise error(f"{folder / RECORD}: damaged: {name} is not an object. Restore it from a backup.")
    data, config = record.get("data") or {}, record.get("config") or {}
    sets, names = {"train": data.get("train"), "eval": data.get("eval")}, (config.get("data") or {}).get("eval")
    if isinstance(names, dict):
        sets |= {f"eval.{name}": of for name, of in (sets.pop("eval") or {}).items()}
    for name, of in sets.items():
        _check_type(folder / RECORD, f"data.{name}", of, dict, error)
        for key, value in (of or {}).items():
            _check_type(folder / RECORD, f"data.{name}.{key}", value, DATA_TYPES.get(key, int), error)
    return record


def _check_type(path: Path, name: str, value: Any, kind: Any, error: type[UserError]) -> None:
    """Raise `error` for a value of another kind, other than null, and for an integer of absurd size."""
    absurd = isinstance(value, int) and abs(value) >= 2**63
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or absurd):
        wanted = next(words for type_, words in TYPE_NAMES.items() if isinstance(type_(), kind))
        raise error(f"{path}: damaged: {name} is not {wanted}. Restore it from a backup.")


def newest_record(output: Path) -> dict[str, Any] | None:
    """The record of a finished run, else of its newest checkpoint, as its `kind` says; None if there is neither.

    Raises:
        FilesError: as `read_record`.
    """
    folders = [folder for folder in (*checkpoints(output), output) if (folder / RECORD).is_file()]
    return read_record(folders[-1], FilesError) if folders else None


def checkpoint_folders(output: Path) -> list[Path]:
    """All folders named like checkpoints, oldest first, complete or not."""
    folders = (output / "checkpoints").glob("step-*")
    return sorted((p for p in folders if re.fullmatch(r"step-\d+", p.name) and p.is_dir()), key=step_of)


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, which have a record, oldest first."""
    return [p for p in checkpoint_folders(output) if (p / RECORD).is_file()]


def checkpoint_of(output: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return output / "checkpoints" / f"step-{step}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def manifest_names(folder: Path) -> list[str]:
    """The names in a folder's manifest. Raises FilesError as `read_json`, or if one leads out of the folder."""
    entries = read_json(folder / RECORD, FilesError).get("files") or {}
    names: dict = dict.fromkeys(entries) if isinstance(entries, dict) else entries
    verify_manifest(folder, names, FilesError)  # checks names only, as no entry has a size
    for name in names:
        if not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
            raise FilesError(f"{folder / name}: leads out of the folder through a link. Remove the link.")
    return list(names)


def is_own_report(path: Path) -> bool:
    """Whether `path` is a report file written by this tool, which names itself at the start of each."""
    return path.is_file() and b"lora-ft" in path.read_bytes()[:1024]
