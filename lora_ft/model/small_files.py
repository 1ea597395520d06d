"""The small files of a model that a copy of it needs, copied without what is not the model's: links and paths."""

import re
from pathlib import Path
from typing import Any

from lora_ft.core.errors import ModelError
from lora_ft.core.names import is_local, portable_name
from lora_ft.core.storage import read_json, write_json
from lora_ft.model.files import Base

# What transformers reads beside the weights; NOT_COPIED: of weights in other formats, which are left out, and of a run
SMALL = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja"]
SMALL += ["LICENSE*", "NOTICE*"]
NOT_COPIED = ("*.index.json", "lora_ft.json", "adapter_config.json", "trainer_state.json", "state.json")
NOTED_PATH = re.compile(r"(name_or_path|_file|_path|_dir)$")  # keys under which libraries note what they have loaded


def small_files(base: Base) -> list[Path]:
    """The files that belong to a copy of the base: config, tokenizer, templates and licence, and code if it is trusted.

    Raises:
        ModelError: one is a link out of the folder, to a file that nobody gave with the model.
    """
    patterns = (*SMALL, *(["*.py"] if base.trusted_code else []))
    skipped = {path for pattern in NOT_COPIED for path in base.folder.glob(pattern)}
    files = {path for pattern in patterns for path in base.folder.glob(pattern) if path.is_file()}
    for path in sorted(files - skipped):
        require_inside(base.folder, path)
    return sorted(files - skipped)


def require_inside(folder: Path, path: Path) -> None:
    """Raise ModelError if `path` is a link out of `folder`. In the hub's cache, files are links to the model's blobs."""
    real, target = folder.resolve(), path.resolve()
    blobs = [(real.parents[1] / "blobs").resolve()] if real.parent.name == "snapshots" else []
    if not any(target.is_relative_to(place) for place in (real, *blobs)):
        raise ModelError(
            f"{path}: a link out of its folder, to {target}. Replace it by a copy of that file, or remove it."
        )


def forget_paths(folder: Path) -> None:
    """Remove the paths of this machine that libraries have noted in the config files of a model in `folder`."""
    for path in (*sorted(folder.glob("*config.json")), folder / "special_tokens_map.json"):
        if path.is_file():
            config = read_json(path, ModelError)
            if (kept := _without_paths(config)) != config:
                write_json(path, kept)


def _without_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_paths(v) for k, v in value.items() if not (NOTED_PATH.search(k) and _is_path(k, v))}


def _is_path(key: str, value: Any) -> bool:
    return isinstance(value, str) and (
        portable_name(value) != value or (key.endswith("name_or_path") and is_local(value))
    )
