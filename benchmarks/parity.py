"""The loss curve of lora-ft against a plain padded training loop: same initial weights, same batches, the real model.

    python benchmarks/parity.py CONFIG [--set adapter.method=METHOD ...] [--steps 30]

The reference is PEFT for lora and prompt, plain PyTorch for full and bottleneck. Prints both losses of each step and the
largest difference; exits with 1 if it is above 1e-4. LoRA's targets may be any of the roles of Llama-like models.
"""

import argparse
import sys
import tempfile

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft_trainer import Collator
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, get_scheduler

from lora_ft.config.load import load_config
from lora_ft.config.schema import AdapterConfig
from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.data.prepare import prepare
from lora_ft.methods.interface import METHODS, virtual_ids
from lora_ft.methods.lora.inject import lora_layers
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base, load_tokenizer
from lora_ft.nn.attention import Isolation
from lora_ft.nn.bottleneck import Bottleneck
from lora_ft.training.trainer import LoRATrainer

PLAIN = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


class Houlsby(nn.Module):
    """The adapter layer of Houlsby et al. 2019, figure 2, on the output of a frozen layer."""

    def __init__(self, layer: nn.Module, weights: list[torch.Tensor], nonlinearity: str):
        super().__init__()
        self.layer, self.f = layer, PLAIN[nonlinearity]
        self.D, self.d, self.U, self.u = (nn.Parameter(w.clone()) for w in weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.f(y @ self.D.T + self.d) @ self.U.T + self.u + y


def reference(model: PreTrainedModel, ours: PreTrainedModel, adapter: AdapterConfig) -> nn.Module:
    """The bare `model` with the method and the initial weights of `ours`, but without lora-ft's layers."""
    model.requires_grad_(adapter.method == "full")
    if adapter.method == "bottleneck":
        for path, layer in [(p, m) for p, m in ours.named_modules() if isinstance(m, Bottleneck)]:
            weights = [p.detach() for name, p in layer.named_parameters() if not name.startswith("base.")]
            model.set_submodule(path, Houlsby(model.get_submodule(path), weights, adapter.nonlinearity))
    elif adapter.method == "prompt":
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=adapter.virtual_tokens)
        theirs = get_peft_model(model, settings)
        theirs.prompt_encoder["default"].embedding.weight.data.copy_(ours.get_input_embeddings().prompt)
        return theirs
    elif adapter.method == "lora":
        modules = [f"{role}_proj" for role in adapter.targets]
        theirs = get_peft_model(model, LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=modules))
        for path, layer in lora_layers(ours).items():
            (A,) = layer.lora_A.values()
            theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(A.data)
        return theirs
    return model


def main() -> None:
    """Train both and compare their losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    base, train, adapter = resolve(config.model.name), config.train, config.adapter
    tokenizer = load_tokenizer(base)
    data, _ = prepare(config.data, tokenizer, train.seed)
    ours = load_base(base, "float32")
    METHODS[adapter.method].inject(ours, adapter, train.seed, tokenizer)
    theirs = reference(load_base(base, "float32"), ours, adapter)
    examples = data.with_prefix(virtual_ids(ours))
    plan = StepPlan(examples.dataset, train.batch_size, 1, options.steps, RowPacking(1024), train.seed)

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
            ours, arguments, plan, Isolation.detect(ours, examples.report.longest), None, lambda *_: None, lines.append
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
        print(f"step {step + 1:3}  lora-ft {line['loss']:.6f}  reference {loss.item():.6f}", flush=True)
    print(f"largest difference {worst:.2e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
