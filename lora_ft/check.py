"""`lora-ft check`: everything short of training, within seconds: config, rows as the model sees them, targets, sizes."""

import itertools
import json

import torch
import yaml
from rich.console import Console
from rich.text import Text

from lora_ft.adapter.inject import lora_layers, trainable
from lora_ft.base import resolve, weight_files
from lora_ft.config import Config
from lora_ft.data.batches import Cut, Plan
from lora_ft.data.prepare import prepare
from lora_ft.methods.verbs import inject
from lora_ft.model import load_tokenizer, skeleton
from lora_ft.names import printable

SHOWN_ROWS = 2


def check(
    config: Config, *, as_json: bool = False, trust_remote_code: bool = False, allow_pickle: bool = False
) -> None:
    """Print what a run of `config` would do; the same errors as training for what is wrong."""
    base = resolve(config.model.name, config.model.revision, allow_pickle)
    if not base.gguf and not base.pickles:
        weight_files(base)
    tokenizer = load_tokenizer(base, trust_remote_code)
    train_set, eval_set = prepare(config.data, tokenizer, config.train.seed)
    train = config.train
    model = skeleton(base, trust_remote_code)
    weights = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):  # shapes without memory
        adapted = inject(model, config.adapter, train.seed, tokenizer)
    parameters = sum(p.numel() for p in trainable(model).values())
    plan = Plan(train_set.dataset, train.batch_size, train.num_train_epochs, train.max_steps, Cut(1), train.seed)
    facts = {
        "train": train_set.report.as_dict(),
        "eval": eval_set.report.as_dict() if eval_set else None,
        "steps": len(plan),
        "base_parameters": weights,
        "trainable_parameters": parameters,
        "trainable_share": parameters / weights,
        "adapter_bytes": 4 * parameters,
        "adam_bytes": 8 * parameters,
        "targets": {path: list(layer.rows) for path, layer in lora_layers(model).items()},
    }
    if as_json:
        print(json.dumps({"config": config.model_dump(mode="json"), **facts}))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False)
    console.print(f"train: {train_set.report.summary()}", markup=False)
    if eval_set:
        console.print(f"eval: {eval_set.report.summary()}", markup=False)
    for i in range(min(SHOWN_ROWS, len(train_set.dataset))):
        example = train_set.dataset[i]
        console.print(f"\nrow {example['row']}, {len(example['input_ids'])} tokens, supervised between » and «:")
        console.print(seen(example, tokenizer))
    names = ", ".join(list(facts["targets"])[:4])
    console.print(f"\n{config.adapter.method}: {adapted}" + (f", {names} ..." if names else ""), markup=False)
    console.print(
        f"trainable: {parameters:,} of {weights:,} parameters ({parameters / weights:.2%}); "
        f"adapter {facts['adapter_bytes'] / 2**20:.1f} MiB, Adam's state {facts['adam_bytes'] / 2**20:.1f} MiB"
    )
    console.print(f"steps: {len(plan)} of {train.batch_size} examples")


def seen(example: dict, tokenizer) -> Text:
    """A row after template, truncation and masking; supervised tokens bold and between » and «."""
    text = Text()
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    for supervised, run in itertools.groupby(pairs, key=lambda pair: pair[1] >= 0):
        piece = tokenizer.decode([token for token, _ in run])  # a run at a time: a character may be several tokens
        shown = "\n".join(printable(line, 100_000) for line in piece.split("\n"))
        text.append(f"»{shown}«" if supervised else shown, style="bold green" if supervised else "")
    return text
