"""A trained folder: which method trained it, on which base, and whether both are what they were.

The one place that knows what a folder is:

- a run's output or checkpoint: an adapter, or full fine-tuning's model, and the record `lora_ft.json`;
- another tool's adapter: `adapter_config.json` without a record;
- an unfinished run: checkpoints, but no record yet;
- anything else, such as a merged model, is not a trained folder.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lora_ft.config.load import parse_config
from lora_ft.config.schema import Config
from lora_ft.core.errors import ModelError, UserError
from lora_ft.core.messages import first_line, info, printable, warn
from lora_ft.core.paths import local_path, refuse_not_utf8
from lora_ft.core.run_folder import RECORD, TEMPLATE, checkpoints, read_record
from lora_ft.core.storage import read_json, verify_manifest
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.methods.lora.peft_config import CONFIG
from lora_ft.model.files import Base, digest, resolve
from lora_ft.model.small_files import require_inside
from lora_ft.nn.forms import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a method's `save` returns: the names of the files, and what the record must contain for them
Saved = tuple[list[str], dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """What was trained into a folder, its manifest verified."""

    folder: Path  # as the user named it
    method: str  # lora, full, bottleneck or prompt
    record: dict[str, Any]  # the content of `lora_ft.json`; empty for another tool's adapter
    adapter_config: dict[str, Any]  # the content of `adapter_config.json`; empty for full fine-tuning

    @classmethod
    def open(cls, folder: Path) -> "Trained":
        """Read a folder's record and config, and verify its files against the manifest.

        Raises:
            ModelError: nothing trained there, an unfinished run, a merged model, or a damaged or changed file.
        """
        refuse_not_utf8(folder, ModelError)
        record = read_record(folder) or {}
        if record and (found := record.get("format")) != 1:
            raise ModelError(f"{folder / RECORD}: format {found!r}; this lora-ft reads format 1. Update lora-ft.")
        if record.get("kind") == "merged":
            raise ModelError(f"{folder}: a merged model, not an adapter. Its adapter is already part of its weights.")
        verify_manifest(folder, record.get("files") or {}, ModelError)
        if message := unfinished_run(folder):
            raise ModelError(message)
        if not is_trained(folder):
            problem = "nothing trained there" if folder.is_dir() else "no such folder"
            way_out = "Train first with `lora-ft train CONFIG`, or give the folder that a training run or PEFT wrote."
            raise ModelError(f"{folder}: {problem}. {way_out}")
        adapter_config = read_adapter_config(folder) if (folder / CONFIG).is_file() else {}
        return cls(folder, _method(folder, adapter_config), record, adapter_config)

    @cached_property
    def config(self) -> Config | None:
        """The run's config; None for another tool's adapter. Raises ConfigError if it is damaged."""
        return run_config(self.folder, self.record)

    @property
    def chat_template(self) -> str | None:
        """The text of the folder's own chat template; None if it was trained with the tokenizer's, or without one.

        It is copied into exports, so a path that a record names is not read: only the copy in the folder.
        """
        path = self.folder / TEMPLATE
        if not ((self.record.get("config") or {}).get("data") or {}).get("messages") or not path.is_file():
            return None
        require_inside(self.folder, path)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ModelError(f"{path}: can't be read ({first_line(e)}). Restore it from a backup.") from e

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """The tokens that the run added to its base."""
        adapter = (self.record.get("config") or {}).get("adapter") or {}
        return tuple(map(str, adapter.get("add_tokens") or ()))

    @property
    def alone(self) -> str | None:
        """Why several of these can't share a base by name, in words; None for LoRA's A and B, which can."""
        if self.method != "lora":
            return f"of method {self.method}"
        if self.adapter_config.get("modules_to_save"):
            return "with modules trained in full"
        return "with trained embedding rows" if self.adapter_config.get("trainable_token_indices") else None

    @property
    def base_name(self) -> str | None:
        """The base that the folder names, a hub id or a local folder; None if it names none."""
        return self._recorded_base.get("name") or self.adapter_config.get("base_model_name_or_path")

    def base(self, name: str | None = None, trust: Trust = NO_TRUST, revision: str | None = None) -> Base:
        """The base with the run's new tokens: the recorded one at the recorded revision, unless another `name` is given."""
        return replace(self._files(name, trust, revision), new_tokens=self.new_tokens)

    def _files(self, name: str | None, trust: Trust, revision: str | None) -> Base:
        name = name or self.base_name
        if not name:
            raise ModelError(f"{self.folder}: does not name the base it was trained on. Name it with --base.")
        if name != self._recorded_base.get("name"):
            return resolve(name, revision, trust)
        revision = self._recorded_base.get("revision")
        if revision is None and not os.path.exists(local_path(name)):  # it was a folder: never ask the hub for its name
            problem = f"{self.folder} was trained on a local base of that name, and there is none here."
            raise ModelError(f"model {name}: {problem} Say where it is: --base FOLDER.")
        return resolve(name, revision, trust)

    def check(
        self, base: Base, tokenizer: "PreTrainedTokenizerBase | None", other_base: bool, name: str | None = None
    ) -> None:
        """Check that this is the base, and the tokenizer (None: has none), of the training; else raise ModelError.

        other_base: only warn. name: of one of several adapters, for messages.
        """
        prefix = f"adapter {printable(name)}: " if name else ""
        check_base(self.record, base, other_base, prefix)
        trained_with = self.record.get("tokenizer")
        if tokenizer is None:
            if trained_with:
                problem = "has no tokenizer, but the adapter was trained with one. Restore its files."
                raise ModelError(f"{prefix}model {base.name}: {problem}")
            return
        from lora_ft.model.load import tokenizer_hash  # imports torch, which `inspect` does without

        if trained_with not in (None, tokenizer_hash(tokenizer)):
            problem = "its tokenizer (vocabulary, merges or special tokens) has changed since the training."
            _refuse(f"{prefix}base {base.name}: {problem}", "Restore it", other_base)
        template = self.record.get("chat_template")
        if template and template != digest(tokenizer.chat_template):
            used = " The one of the training is used." if self.chat_template else ""
            warn(f"{prefix}base {base.name}: its chat template has changed since the training.{used}")

    @property
    def quantization(self) -> Form | None:
        """How the base was quantized in the training. Raises ModelError for a form that is not known here."""
        form = self._recorded_base.get("quantization")
        if form not in (None, *get_args(Form)):
            problem = f"quantization {form!r:.100}; this lora-ft knows {', '.join(get_args(Form))}. Update lora-ft."
            raise ModelError(f"{self.folder / RECORD}: {problem}")
        return form

    def note_form(self, used: Form | None) -> None:
        """Print a note where this is used on another form of its base than it was trained on; no rule against it."""
        if self.record and used != self.quantization:
            trained, now = (form or "not quantized" for form in (self.quantization, used))
            info(f"note: {self.folder} was trained on its base {trained}, and is used on it {now}: another function")

    @property
    def _recorded_base(self) -> dict[str, Any]:
        return self.record.get("base", {})


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`. Raises ModelError if it can't be read, or its base is no name."""
    config = read_json(folder / CONFIG, ModelError)
    if not isinstance(name := config.get("base_model_name_or_path"), str | None):
        raise ModelError(f"{folder / CONFIG}: base_model_name_or_path is {name!r:.100}; it must be a name.")
    return config


def run_config(folder: Path, record: Mapping[str, Any]) -> Config | None:
    """The config in a folder's record, as of `run_settings`; None if it has none. Raises ConfigError if it is damaged."""
    settings = run_settings(folder, record)
    return parse_config(settings) if settings else None


def run_settings(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings in a folder's record, None if it has none; the chat template is the copy in the folder, if there is one."""
    settings, template = record.get("config"), folder / TEMPLATE
    if settings and (settings.get("data") or {}).get("messages") and template.is_file():
        settings = {**settings, "data": {**settings["data"], "chat_template": str(template)}}
    return settings


def training_records(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is recorded of each training behind a folder: its own record, or those of the adapters that it was made of."""
    parts = (record.get("made_of") or {}).get("parts")
    own = [part.get("record") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return [found for of in own if isinstance(of, dict) for found in training_records(of)] or [record]


def is_trained(folder: Path, error: type[UserError] = ModelError) -> bool:
    """Whether a finished run, a checkpoint or another tool's adapter is in a folder, not verified; see `read_record`."""
    if unfinished_run(folder):
        return False
    if (folder / CONFIG).is_file():
        return True
    record = read_record(folder, error) or {}
    adapter = record.get("config", {}).get("adapter")
    full = isinstance(adapter, dict) and adapter.get("method") == "full"
    return full and record.get("kind") in ("adapter", "checkpoint")


def is_model(folder: Path) -> bool:
    """Whether a folder holds a complete model that is not a run's: a merged one, or any of transformers."""
    return (folder / "config.json").is_file() and not is_trained(folder)


def unfinished_run(folder: Path) -> str | None:
    """A message about a run that was interrupted (it has checkpoints but no record), else None."""
    found = checkpoints(folder)
    if not found or (folder / RECORD).is_file():
        return None
    names = ", ".join(map(str, found[-3:]))
    return f"{folder}: its run is unfinished. Resume it with `lora-ft train CONFIG --resume`, or name a checkpoint: {names}."


def check_base(record: dict[str, Any], base: Base, other_base: bool, prefix: str = "") -> None:
    """Check that `base` has the weights that a record was trained on: else raise ModelError, or warn with `other_base`."""
    trained_on = record.get("base", {}).get("fingerprint")
    if trained_on is None:
        info(f"note: {prefix}cannot verify that {base.name} is its base: the adapter has no fingerprint")
    elif trained_on != base.fingerprint:
        fingerprints = f"fingerprint {base.fingerprint[:12]}, was {trained_on[:12]}"
        problem = f"{prefix}base {base.name}: not the weights the adapter was trained on ({fingerprints})."
        _refuse(problem, "Name the right one with --base", other_base)


def _refuse(problem: str, way_out: str, other_base: bool) -> None:
    if not other_base:
        raise ModelError(f"{problem} {way_out}, or use it anyway with --other-base.")
    warn(f"{problem} Continuing because of --other-base.")


def _method(folder: Path, adapter_config: dict[str, Any]) -> str:
    if not adapter_config:
        return "full"
    if adapter_config.get("peft_type") == "PROMPT_TUNING":
        return "prompt"
    if adapter_config.get("method") == "bias":
        raise ModelError(f"{folder}: trained with method bias, which is no longer supported.")
    return "bottleneck" if adapter_config.get("method") == "bottleneck" else "lora"
