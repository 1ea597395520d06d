"""The one Trainer subclass: a step is a list of flat micro-batches.

An item of the plan is a whole optimizer step (data/batches.py), so gradient accumulation, batch sizes and epochs are the plan's
and the Trainer sees one long epoch. The loss is the sum over supervised tokens divided by their number in the whole step, so
that cutting a step into micro-batches changes no gradient beyond rounding.
"""

import math
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_ft import checkpoint
from lora_ft.attention import Packing
from lora_ft.data.batches import Plan, Step
from lora_ft.errors import NumbersError
from lora_ft.loss import summed_loss, supervised_logits


class LoRATrainer(Trainer):
    """Trains the adapters of `model` along a plan.

    Args:
        plan: the steps.
        packing: how the model keeps the examples of a row apart.
        evaluation: metrics of the model as it is, without the "eval_" prefix; None without eval data.
        save: writes a complete checkpoint folder of the state it is given.
        patience: evaluations without improvement before training stops.
        log_line: writes a line of the log.
    """

    control: TrainerControl

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        plan: Plan,
        packing: Packing,
        evaluation: Callable[[], dict] | None,
        save: Callable[[checkpoint.State], None],
        log_line: Callable[[dict], None],
        patience: int | None = None,
    ):
        self.plan, self.packing, self.evaluation, self.save, self.log_line = plan, packing, evaluation, save, log_line
        self.counts = checkpoint.Counts()  # what the next log line is about; sums since the last one, and totals
        self.since = time.perf_counter()  # when those sums began, not counting evaluation and saving
        self.started = self.since
        self.early_stopping = EarlyStoppingCallback(patience) if patience else None
        callbacks = [_Flow(), *([self.early_stopping] if self.early_stopping else []), _Bar()]
        stand_in = plan if evaluation else None  # the Trainer wants to see a data set; `evaluate` has its own
        super().__init__(model=model, args=args, train_dataset=plan, eval_dataset=stand_in, callbacks=callbacks)
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)

    # ---- a step ----

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.plan, batch_size=1, shuffle=False, collate_fn=_only, num_workers=0)

    def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch=None) -> torch.Tensor:
        """Gradients of one whole optimizer step; returns its mean loss per supervised token."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for micro in inputs["micro"]:
            if not len(micro["keep"]):
                continue
            micro = self._prepare_inputs(micro)
            with self.packing.row(self.model, micro["lengths"]):  # still open in the backward: checkpointing recomputes
                with self.compute_loss_context_manager():
                    logits = supervised_logits(model, micro["input_ids"], micro["position_ids"], micro["keep"])
                    loss = summed_loss(logits, micro["targets"])
                self.accelerator.backward(loss / inputs["total"])
            total += loss.detach()
        self.step_now, self.step_loss = inputs, total
        return total / max(1, inputs["total"])

    def _get_grad_norm(self, model, grad_norm=None):
        """Called right before the optimizer's step: the last moment to keep NaN and inf out of the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, loss, norm = self.step_now, float(self.step_loss), float(grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            rows = ", ".join(str(r) for r in step["rows"][:16])
            raise NumbersError(
                f"step {self.state.global_step + 1}: the {what} is not a finite number. The step's rows (from 0) in the "
                f"training data: {rows}. Nothing of it was saved. Lower train.learning_rate, or look at those rows."
            )
        self.counts.add(loss, step["total"], step["tokens"])
        return norm

    # ---- evaluation, logging ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        begun = time.perf_counter()
        assert self.evaluation is not None, "the Trainer evaluates only where there is eval data"
        metrics = {f"eval_{k}": v for k, v in self.evaluation().items()}
        self.since += time.perf_counter() - begun
        self.log({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial) -> bool:
        """A new best is checkpointed at once, and so is the step at which patience ended."""
        best = super()._determine_best_metric(metrics, trial)
        if best or self.control.should_training_stop:
            self.control.should_save = True
        return best

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Write a line of log.jsonl and pass it on to the callbacks (TensorBoard and others)."""
        self.state.epoch = self.plan.epoch_at(self.state.global_step)
        if "loss" in logs:
            now = time.perf_counter()
            logs = {**logs, **self.counts.line(now - self.since), "peak_memory_mb": peak_memory_mb(self.args.device)}
            self.since = now
        elif "train_runtime" in logs:  # the Trainer's summary at the end; its counts know nothing of the plan
            self.training_seconds = logs["train_runtime"]
            return
        logs["seconds"] = round(time.perf_counter() - self.started, 3)
        logs["epoch"] = round(self.state.epoch, 6)
        self.log_line({"step": self.state.global_step, **logs})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # ---- checkpoints ----

    def _save_checkpoint(self, model, trial) -> None:
        begun = time.perf_counter()
        self.save(
            checkpoint.State.take(
                self.model, self.optimizer, self.lr_scheduler, self.state, self.counts, self.early_stopping
            )
        )
        self.since += time.perf_counter() - begun


class _Flow(TrainerCallback):
    """The last step is always logged."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= state.max_steps:
            control.should_log = True


class _Bar(TrainerCallback):
    """A progress bar with loss, tokens per second and time left, on a terminal only; evaluations leave a line anywhere."""

    def on_train_begin(self, args, state, control, **_):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {logs['tokens_per_second']:.0f} tokens/s")

    def on_evaluate(self, args, state, control, metrics=None, **_):
        shown = ", ".join(f"{k.removeprefix('eval_')} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        self.bar.clear()
        print(f"step {state.global_step} of {state.max_steps}, eval: {shown}", file=sys.stderr)
        self.bar.refresh()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def _only(items: list[Step]) -> Step:
    return items[0]


def peak_memory_mb(device: torch.device) -> float:
    """The allocator's maximum on a GPU, the process's maximum resident set elsewhere; MiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB here
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
