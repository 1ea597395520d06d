"""The loss curve of lora-ft against PEFT's in a plain padded loop: equal initial A, equal batches, the real model.

    python benchmarks/parity.py CONFIG [--set KEY=VALUE ...] [--steps 30]

Prints both losses a step and the largest difference; exits with 1 above 1e-4. For q, k, v, o, gate, up, down modules of
Llama-like models.
"""

import argparse
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from peft_trainer import Collator
from transformers import TrainingArguments, get_scheduler

from lora_ft.adapter.inject import inject_lora, lora_layers
from lora_ft.attention import Packing
from lora_ft.base import resolve
from lora_ft.config import load_config
from lora_ft.data.batches import Cut, Plan
from lora_ft.data.prepare import prepare
from lora_ft.model import load_base, load_tokenizer
from lora_ft.trainer import LoRATrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    base, train, adapter = resolve(config.model.name), config.train, config.adapter
    data, _ = prepare(config.data, load_tokenizer(base), train.seed)
    plan = Plan(data.dataset, train.batch_size, 1, options.steps, Cut(1024), train.seed)

    ours = load_base(base, "float32")
    inject_lora(ours, adapter.targets, adapter.rank, adapter.alpha, seed=train.seed)
    theirs = get_peft_model(
        load_base(base, "float32"),
        LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=[f"{r}_proj" for r in adapter.targets]),
    )
    for path, layer in lora_layers(ours).items():
        (A,) = layer.lora_A.values()
        theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(A.data)

    lines: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=1,
            max_steps=options.steps,
            learning_rate=train.learning_rate,
            warmup_steps=train.warmup_steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        LoRATrainer(
            ours, arguments, plan, Packing.of(ours, data.report.longest), None, lambda *_: None, lines.append
        ).train_from(None)

    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=0.0)
    warmup = arguments.get_warmup_steps(options.steps)
    schedule = get_scheduler("linear", optimizer, warmup, options.steps)
    pad, worst = Collator(0), 0.0
    theirs.train()
    for step, line in enumerate(lines):
        batch = pad([data.dataset[i] for i in plan.examples(step)])
        loss = theirs(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        worst = max(worst, abs(loss.item() - line["loss"]))
        print(f"step {step + 1:3}  lora-ft {line['loss']:.6f}  PEFT {loss.item():.6f}")
    print(f"largest difference {worst:.2e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
