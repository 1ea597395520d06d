"""The record, lora_ft.json: what a run was, so that its adapter can be scored, merged and trusted later."""

import platform
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.load import Config
from lora_ft.core.errors import ModelError
from lora_ft.core.storage import read_json
from lora_ft.data.examples import Examples, reports
from lora_ft.methods.lora.files import RECORD
from lora_ft.model.files import Base, digest, fingerprint
from lora_ft.model.load import tokenizer_hash

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "tokenizers")


def describe(
    config: Config,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    train_set: Examples,
    eval_sets: dict[str, Examples],
) -> dict:
    """What is known of a run before its first step."""
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "base": {
            "name": base.name,
            "revision": base.revision,
            "fingerprint": fingerprint(base),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": digest(tokenizer.chat_template)
        if config.data.messages and not config.data.chat_template
        else None,
        "data": {"train": train_set.report.as_dict(), "eval": reports(eval_sets)},
        "seed": config.train.seed,
        "versions": {"python": platform.python_version(), "lora_ft": version("lora-ft")}
        | {name: version(name) for name in PACKAGES},
    }


def read_record(folder: Path) -> dict | None:
    """The record of an adapter or a merged model, without its manifest's check; None for another tool's folder."""
    path = folder / RECORD
    return read_json(path, ModelError) if path.is_file() else None
