"""PEFT with the Hugging Face Trainer, as it is commonly used, on the same encoded examples as lora-ft.

    python benchmarks/peft_trainer.py CONFIG OUTPUT [--set KEY=VALUE ...] [--group-by-length]

Reads a lora-ft config, so that model, data, rank, targets, schedule, batch size and seed are the same, and writes a PEFT
adapter to OUTPUT. Score it with `lora-ft eval OUTPUT --config CONFIG`.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from lora_ft.config.load import load_config
from lora_ft.data.prepare import prepare
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base, load_tokenizer


class Collator:
    """Dynamic padding: pads a batch to its longest example."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(r["input_ids"]) for r in rows)
        gaps = [width - len(r["input_ids"]) for r in rows]
        return {
            "input_ids": torch.tensor([r["input_ids"] + [self.pad] * g for r, g in zip(rows, gaps, strict=True)]),
            "labels": torch.tensor([r["labels"] + [-100] * g for r, g in zip(rows, gaps, strict=True)]),
            "attention_mask": torch.tensor([[1] * (width - g) + [0] * g for g in gaps]),
        }


def main() -> None:
    """Train and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("output")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--group-by-length", action="store_true")
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    base = resolve(config.model.name)
    tokenizer = load_tokenizer(base)
    data, _ = prepare(config.data, tokenizer, config.train.seed)
    torch.manual_seed(config.train.seed)
    adapter = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules=[f"{role}_proj" for role in config.adapter.targets],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(base, config.model.dtype), adapter)
    train = config.train
    arguments = TrainingArguments(
        output_dir=options.output,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=train.batch_size,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.dataset.select_columns(["input_ids", "labels"]),
        data_collator=Collator(pad),
    )
    trainer.train()
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
