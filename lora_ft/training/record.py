"""The record of a run, lora_ft.json: what its adapter is used with later."""

import platform
from dataclasses import asdict
from importlib.metadata import version

import torch

from lora_ft.data.examples import reports
from lora_ft.distributed import processes
from lora_ft.model.files import digest
from lora_ft.model.load import tokenizer_hash
from lora_ft.training.setup import RunSetup

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "tokenizers")  # whose versions it has


def new_record(setup: RunSetup) -> dict:
    """The record as far as it is known before the first step."""
    config, base, data = setup.config, setup.base, setup.config.data
    own_template = digest(setup.tokenizer.chat_template) if data.messages and not data.chat_template else None
    versions = {"python": platform.python_version(), "lora_ft": version("lora-ft")}
    trainable, total = setup.parameters
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "base": {
            "name": base.name,
            "revision": base.revision,
            "fingerprint": base.fingerprint,
            "dtype": str(setup.model.dtype).removeprefix("torch."),
            "quantization": config.model.quantization,
        },
        "tokenizer": tokenizer_hash(setup.tokenizer),
        "chat_template": own_template,
        "data": {"train": asdict(setup.train_set.report), "eval": reports(setup.eval_sets)},
        "seed": config.train.seed,
        "versions": versions | {name: version(name) for name in PACKAGES},
        "trainable_parameters": trainable,
        "parameters": total,
        "planned_steps": len(setup.plan),
        "machine": {"device": setup.device, "threads": torch.get_num_threads(), "processes": processes.world_size()},
    }
