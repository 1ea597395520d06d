"""The data of `lora-ft eval`: read by the run's template, and compared with the rows that were trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ft.commands.check.warnings import in_common
from lora_ft.config.load import NOT_TRAINING, parse_config
from lora_ft.config.schema import Config, DataConfig, eval_sets
from lora_ft.core.errors import DataError, UserError
from lora_ft.core.messages import listed, warn
from lora_ft.core.names import template_columns
from lora_ft.data.chats.raw_turns import message_columns
from lora_ft.data.examples import Examples
from lora_ft.data.prepare import prepare, prepare_eval_sets
from lora_ft.methods.trained import run_settings

MOST_ROWS = 200_000  # that are encoded once more for a warning


def read_eval_sets(
    folder: Path, config: Config, tokenizer: PreTrainedTokenizerBase, named: bool
) -> dict[str, Examples]:
    """The eval sets; named: the command line names the data, so that an error says which columns the template reads."""
    try:
        return prepare_eval_sets(config.data, tokenizer, config.train.seed)
    except DataError as e:
        if not named:
            raise
        columns = listed([f'"{column}"' for column in columns_of(config.data)])
        way = "Give data that has them, or another template: --set 'data.prompt=...' and --set 'data.completion=...'."
        raise DataError(f"{e}\n{folder} is scored with a template that reads these columns: {columns}. {way}") from e


def columns_of(data: DataConfig) -> list[str]:
    """The columns that a data section reads."""
    templates = [text for text in (data.prompt, data.completion, data.text) if text]
    own = [column for text in templates for column in template_columns(text)]
    return list(dict.fromkeys([*(message_columns(data.messages) if data.messages else []), *own]))


def warn_of_trained_rows(
    folder: Path,
    record: Mapping[str, Any],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Examples],
) -> None:
    """Warn of eval rows that the folder was trained on: by their tokens, or else by the content of the named files."""
    trained_on = (record.get("data") or {}).get("train") or {}
    train_set, sources = _training_set(folder, record, tokenizer), eval_sets(config.data.eval)
    for name, examples in sets.items():
        what = f"eval {name}".strip()
        if train_set:
            if common := in_common(train_set, examples):
                of = f"{common:,} of its {len(examples.dataset):,} examples"
                warn(
                    f"{what}: {folder} was trained on {of}, so the scores are too good. Give data that it has not seen."
                )
        elif trained_on.get("content") == examples.report.content and isinstance(sources.get(name), tuple):
            warn(
                f"{what}: {folder} was trained on this data, so the scores are too good. Give data that it has not seen."
            )


def _training_set(folder: Path, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Examples | None:
    """What the run was trained on; None if that is not known, is much, or can't be read as it was."""
    trained_on, settings = (record.get("data") or {}).get("train") or {}, run_settings(folder, record)
    if not settings or not trained_on or trained_on.get("rows", 0) > MOST_ROWS:
        return None
    try:
        own = parse_config(settings, NOT_TRAINING)
        train_set = prepare(own.data, tokenizer, own.train.seed)[0]
    except UserError:
        return None
    return train_set if train_set.report.content == trained_on.get("content") else None
