"""One row of the benchmark, in its own process: `python benchmarks/rows.py ROW WORKLOAD MODEL FOLDER STEPS`.

Prints one line of JSON: real tokens and seconds of each step after the warm-up, the losses, the peak memory. bench.py
describes the rows.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft_trainer import Collator
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from workloads import WORKLOADS, config_of

from lora_ft.config.schema import Config
from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.data.prepare import prepare
from lora_ft.methods.lora.inject import inject_lora, lora_layers, trainable
from lora_ft.model.device import micro_batch_tokens, peak_memory_mb, prepare_device
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base, load_tokenizer
from lora_ft.nn.attention import Isolation
from lora_ft.nn.lora import LoRALinear, out_in
from lora_ft.nn.loss import supervised_loss
from lora_ft.training.trainer import LoRATrainer


class StepTimes(TrainerCallback):
    """Records when each step ended, in seconds."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class CountingCollator(Collator):
    """Dynamic padding that records the real tokens of each batch."""

    def __init__(self, pad: int):
        super().__init__(pad)
        self.tokens: list[int] = []

    def __call__(self, rows):
        self.tokens.append(sum(len(r["input_ids"]) for r in rows))
        return super().__call__(rows)


def run(
    row: str, workload: str, model_name: str, folder: Path, steps: int, callbacks: Sequence[TrainerCallback] = ()
) -> dict:
    """Train one row for `steps` timed steps; returns what the script prints."""
    warm = 1 if "length" in WORKLOADS[workload] else 3  # untimed first steps; fewer where a step is long
    steps += warm
    config = config_of(workload, model_name, folder, WORKLOADS[workload]["batch"] * steps)
    ours = row in ("lora-ft", "full")
    if ours:
        device = prepare_device()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = True
    base = resolve(config.model.name)
    tokenizer = load_tokenizer(base)
    data = prepare(config.data, tokenizer, 0)[0].dataset
    plan = StepPlan(
        data,
        config.train.batch_size,
        1,
        steps,
        RowPacking(micro_batch_tokens(config.train.micro_batch_tokens, device), share=ours),
        0,
    )
    tokens = [sum(data[i]["tokens"] for i in plan.examples(s)) for s in range(steps)]
    model = load_base(base, "auto", device=device)
    inject_lora(model, [], config.adapter.rank, config.adapter.alpha, modules=config.adapter.modules, seed=0)
    if row == "floor":
        seconds, flops = floor(model, plan, steps)
        return {"tokens": tokens[warm:], "seconds": seconds[warm:], "flops": flops[warm:]}
    times = StepTimes()
    settings = dict(
        output_dir=str(folder / "run"), use_cpu=device == "cpu", learning_rate=2e-4, warmup_steps=0, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, max_steps=steps,
        bf16=model.dtype is torch.bfloat16 and not ours,
    )  # fmt: skip
    losses: list[dict] = []
    if ours:
        if row == "full":
            all_weights(model)
        arguments = TrainingArguments(**settings, per_device_train_batch_size=1)
        trainer = LoRATrainer(
            model, arguments, plan, Isolation.detect(model, 1024), None, lambda *_: None, losses.append
        )
        for callback in (times, *callbacks):
            trainer.add_callback(callback)
        trainer.train_from(None)
    else:
        order = data.select([i for s in range(steps) for i in plan.examples(s)]).select_columns(["input_ids", "labels"])
        collator = CountingCollator(tokenizer.pad_token_id or 0)
        trainer = peer(row, with_peft(model, config), order, tokenizer, collator, settings, config.train.batch_size)
        trainer.add_callback(times)
        trainer.train()
        losses = trainer.state.log_history
        if row == "grouped":
            tokens = collator.tokens[:steps]
    seconds = [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]
    return {
        "tokens": tokens[warm:],
        "seconds": seconds[warm - 1 :],
        "losses": [line["loss"] for line in losses if "loss" in line],
        "peak_mb": peak_memory_mb(device),
    }


def all_weights(model: PreTrainedModel) -> None:
    """Remove the adapters and train every weight of the base."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base)
    model.requires_grad_(True)


def with_peft(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """Replace lora-ft's adapters by PEFT's with the same initial A."""
    from peft import LoraConfig, get_peft_model

    initial_A = {path: next(iter(layer.lora_A.values())).data for path, layer in lora_layers(model).items()}
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base)
    adapter = config.adapter
    theirs = get_peft_model(
        model,
        LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=adapter.modules, task_type="CAUSAL_LM"),
    )
    for path, A in initial_A.items():
        theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(A)
    return theirs


class InOrder(Trainer):
    """A Trainer that keeps the order of its data: the batches of lora-ft."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def peer(row: str, model, data, tokenizer, collator, settings: dict, batch_size: int) -> Trainer:
    """The Trainer of a row. peft: dynamic padding; grouped: length-grouped sampling; trl: padding-free SFTTrainer."""
    settings = settings | {"per_device_train_batch_size": batch_size}
    if row == "trl":
        from trl import SFTConfig, SFTTrainer

        # A batch is one flat row; transformers isolates its examples, on CPU too, by a mask from the restarting positions.
        class SFTInOrder(SFTTrainer):
            _get_train_sampler = InOrder._get_train_sampler

        arguments = SFTConfig(**settings, padding_free=True, max_length=None, gradient_checkpointing=False)
        return SFTInOrder(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer, sampling = (Trainer, "group_by_length") if row == "grouped" else (InOrder, "random")
    arguments = TrainingArguments(**settings, train_sampling_strategy=sampling)
    return trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)


def floor(model: PreTrainedModel, plan: StepPlan, steps: int) -> tuple[list[float], list[float]]:
    """Seconds per step of the matrix products that training with a frozen base requires, and its FLOPs with the adapters.

    For each linear layer X Wᵀ, and dY W if its input depends on an adapter (not below the first adapted layer, nor in that
    layer's first projections); the head at supervised positions only. A real forward pass tells which products these are;
    then only they run, on random numbers, into preallocated memory.
    """
    calls: list[tuple[torch.Tensor, int, bool]] = []

    def record(module, args):
        layer = module.base if isinstance(module, LoRALinear) else module
        calls.append((out_in(layer), args[0].shape[:-1].numel(), args[0].requires_grad))

    linear_types = {type(layer.base) for layer in lora_layers(model).values()} | {torch.nn.Linear, LoRALinear}
    inner = {layer.base for layer in lora_layers(model).values()}
    for module in model.modules():
        if type(module) in linear_types and module not in inner:
            module.register_forward_pre_hook(record)
    isolation, seconds, flops = Isolation.detect(model, 1024), [], []
    model.train()
    for step in range(steps):
        products = []
        for micro in plan[step]["micro"]:
            calls.clear()
            row = {k: v.to(model.device) for k, v in micro.items() if isinstance(v, torch.Tensor)}
            with isolation.row(model, micro["segments"]):
                supervised_loss(model, **row)
            joined: dict[int, tuple[torch.Tensor, int, bool]] = {}  # the head's chunks as one product
            for W, n, grad in calls:
                joined[W.data_ptr()] = (W, n + joined.get(W.data_ptr(), (W, 0, grad))[1], grad)
            products += joined.values()
        buffers = {}
        for W, n, _ in products:
            shapes = [(n, W.shape[1]), (n, W.shape[0])]
            buffers[W.shape, n] = [torch.randn(s, dtype=W.dtype, device=W.device) for s in shapes * 2]
        for _ in range(2 if step == 0 else 1):  # the first pass warms up
            started = time.perf_counter()
            with torch.no_grad():
                for W, n, grad in products:
                    X, dY, dX, Y = buffers[W.shape, n]
                    torch.mm(X, W.T, out=Y)
                    if grad:
                        torch.mm(dY, W, out=dX)
            if W.is_cuda:
                torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        adapters = 6 * plan[step]["tokens"] * sum(p.numel() for p in trainable(model).values())
        flops.append(float(sum(2 * n * W.numel() * (2 if grad else 1) for W, n, grad in products) + adapters))
    return seconds, flops


if __name__ == "__main__":
    name, workload, model, folder, steps = sys.argv[1:]
    print(json.dumps(run(name, workload, model, Path(folder), int(steps))))
