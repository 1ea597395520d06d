"""The record of a run, lora_ft.json: what its adapter needs to be scored, merged and trusted later."""

import platform
from dataclasses import asdict
from importlib.metadata import version

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.data.examples import Examples, reports
from lora_ft.model.files import Base, digest
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
    """The record as far as it is known before the first step."""
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "base": {
            "name": base.name,
            "revision": base.revision,
            "fingerprint": base.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": digest(tokenizer.chat_template)
        if config.data.messages and not config.data.chat_template
        else None,
        "data": {"train": asdict(train_set.report), "eval": reports(eval_sets)},
        "seed": config.train.seed,
        "versions": {"python": platform.python_version(), "lora_ft": version("lora-ft")}
        | {name: version(name) for name in PACKAGES},
    }
