"""LoRATrainer: transformers' Trainer with optimizer steps cut into flat micro-batches, and with exact resume.

One item of the plan is one optimizer step (data/batches.py): gradient accumulation, batch sizes and epochs are the plan's
business, and the Trainer sees one long epoch.

With several processes, each has the complete adapter and computes its share of a step's examples; one sum of the adapter's
gradients ends the step. So no wrapper is needed, and nothing of the model's size is sent.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainingArguments

from lora_ft.core.metrics import loss_beside, scalars
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.data.batches import Step, StepPlan
from lora_ft.distributed import processes
from lora_ft.methods.interface import METHODS
from lora_ft.methods.lora.inject import trainable
from lora_ft.methods.trained import Trained
from lora_ft.model.device import peak_memory_mb
from lora_ft.nn.attention import Isolation
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.training.checkpoint import LogTotals, RandomState, State
from lora_ft.training.progress import ProgressBar
from lora_ft.training.step import add_gradients, check_finite
from lora_ft.training.together import Together
from lora_ft.training.trainer_seam import SeamTrainer


class LoRATrainer(SeamTrainer):
    """Trains the adapter of `model` along a plan.

    Args:
        model: on its device, with the adapter's parameters requiring gradients.
        args: max_steps is the plan's length.
        evaluation: returns the metrics after a step, without the prefix "eval_"; None without eval data.
        save: saves a checkpoint, given the state and the best step so far.
        log_line: appends a line to the log.
        patience: evaluations without a better metric after which training stops.
        stopper: stops training between micro-batches when a signal has arrived.
        together: the other runs of this process, whose steps are computed with this one's.
    """

    control: TrainerControl

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        plan: StepPlan,
        isolation: Isolation,
        evaluation: Callable[[int], dict] | None,
        save: Callable[[State, int | None], None],
        log_line: Callable[[dict], None],
        patience: int | None = None,
        stopper: Stopper | None = None,
        together: Together | None = None,
    ):
        self.plan, self.isolation, self.evaluation, self.save = plan, isolation, evaluation, save
        self.log_line, self.stopper, self.together = log_line, stopper or Stopper(), together
        self.patience, self.evaluations_since_best, self.best_loss = patience or math.inf, 0, math.inf
        self.totals, self.progress = LogTotals(), ProgressBar(draws=together is None)
        self.started = self.line_started = time.perf_counter()  # line_started: moved on by evaluating and saving
        self.resumed: State | None = None
        if not (together or args.activation_checkpointing):
            keep_gate_and_up(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=plan,
            eval_dataset=plan if evaluation else None,  # never read, but the Trainer requires one
            callbacks=[_Events(self), self.progress],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    # ---- a step ----

    def get_train_dataloader(self) -> DataLoader:
        """The steps that are left; an item is an optimizer step."""
        return DataLoader(
            self.plan,
            batch_size=1,
            sampler=_RemainingSteps(self),
            collate_fn=lambda steps: steps[0],
            pin_memory=self.args.device.type == "cuda",  # a copy to the GPU then waits for nothing
            generator=torch.Generator(),  # a loader without one draws from torch's, which dropout uses
        )

    def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch=None) -> torch.Tensor:
        """Compute the gradients of a step; returns its mean loss per supervised token. Raises Stopped, with no effect, and
        NumbersError if loss or gradient is not finite."""
        if processes.world_size() > 1:  # a function of the step, so that a checkpoint needs only the main process
            seed = (self.args.seed * 1_000_003 + self.state.global_step) * 65_537 + processes.rank()
            torch.manual_seed(seed % 2**64)  # the largest that torch takes
        self.generators_before = RandomState.current()
        if not self.model.training:  # a walk through all modules
            model.train()
        compute = self.together.add_gradients if self.together else add_gradients
        loss = compute(self.model, self.isolation, inputs, self.plan.shard, self.stopper.check)
        check_finite(self.state.global_step + 1, inputs, loss, self.optimizer)
        self.totals.add(float(loss), inputs["total"], inputs["tokens"])
        return loss / max(1, inputs["total"])

    # ---- evaluation and log ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        """Log the metrics after the current step; a new best is saved at once, and so is the step that ends training."""
        assert self.evaluation is not None, "the Trainer evaluates only with eval data"
        started = time.perf_counter()
        metrics = {f"eval_{key}": value for key, value in self.evaluation(self.state.global_step).items()}
        self.line_started += time.perf_counter() - started
        self.log(scalars(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

        # the best is that by its metric, then by its loss, then the later step; step 0 has no adapter to keep
        name, best, step = self.args.metric_for_best_model, self.state.best_metric, self.state.global_step
        value, loss, sign = metrics[name], metrics[loss_beside(name)], 1 if self.args.greater_is_better else -1
        score, before = (sign * value, -loss), (-math.inf if best is None else sign * best, -self.best_loss)
        if step and score >= before:
            self.state.best_metric, self.state.best_global_step, self.best_loss = value, step, loss
            self.control.should_save = True
        self.evaluations_since_best = 0 if score[0] > before[0] else self.evaluations_since_best + 1
        if self.evaluations_since_best >= self.patience:
            self.control.should_training_stop = self.control.should_save = True
        return metrics

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Append a line to the log and pass it on to TensorBoard and the like."""
        if "train_runtime" in logs:  # the Trainer's summary, which counts an item of the plan as one example
            return
        now = time.perf_counter()
        if "loss" in logs:
            logs |= self.totals.flush(now - self.line_started)
            logs["peak_memory_mb"], self.line_started = peak_memory_mb(self.args.device.type), now
        logs |= {"seconds": round(now - self.started, 3), "epoch": round(self.state.epoch, 6)}
        self.log_line({"step": self.state.global_step, **logs})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # ---- checkpoints ----

    def save_checkpoint(self, generators: RandomState | None = None) -> None:
        """Save the state after the last complete step; `generators` are those of the next one, by default the current."""
        started = time.perf_counter()
        generators = generators or RandomState.current()
        state = State.take(self.model, self.optimizer, self.lr_scheduler, self.state, generators)
        state.values |= {
            "counts": asdict(self.totals),
            "seconds": started - self.started,
            "patience_used": self.evaluations_since_best,
            "best_loss": self.best_loss,
            "owed": {"evaluate": self.control.should_evaluate, "save": self.control.should_save},
        }
        self.save(state, self.state.best_global_step)
        self.line_started += time.perf_counter() - started

    def train_from(self, state: State | None, adapter: Path | None = None) -> None:
        """Train to the end of the plan, from the start or from a checkpoint: its `state` and the folder of its `adapter`.

        Raises:
            Stopped: a signal came. The last complete step is saved, and resuming from it is exact.
        """
        self.resumed = state
        self.stopper.deferred = True
        try:
            with processes.collective():
                if adapter:
                    if processes.is_main():
                        trained = Trained.open(adapter)
                        METHODS[trained.method].load_into(self.model, trained)
                    processes.broadcast_tensors(list(trainable(self.model).values()))
                self.train()
            self.stopper.check()  # a signal that came with the last step
        except Stopped as stop:
            stop.hint = self.stopper.hint
            if self.state.global_step == 0:
                stop.args = ("stopped before the end of the first step: nothing to save",)
            else:  # a stopped step is repeated from its start; a stopped evaluation is owed
                self.save_checkpoint(None if self.control.should_evaluate else self.generators_before)
                stop.args = (f"stopped after step {self.state.global_step}, which is saved",)
            raise
        finally:
            self.stopper.deferred = False
            self.progress.close()

    def restore(self, resumed: State) -> None:
        """Continue from the state of a checkpoint, now that optimizer and schedule exist."""
        values = resumed.values
        for name in ("global_step", "best_metric", "best_global_step"):
            setattr(self.state, name, values["trainer"][name])
        resumed.restore_optimizer(self.model, self.optimizer, self.lr_scheduler)
        resumed.generators().restore()
        self.args.eval_on_start = False  # done at the start of the run
        self.totals, self.evaluations_since_best = LogTotals(**values["counts"]), values["patience_used"]
        self.started -= values["seconds"]
        self.best_loss = values.get("best_loss", math.inf)  # a checkpoint of an earlier version has none

    def finish_stopped_step(self) -> None:
        """Run the evaluation during which a resumed run was stopped; train no further if patience had ended."""
        if self.resumed is None:
            return
        owed, self.resumed = self.resumed.values["owed"], None
        if owed["evaluate"]:
            self.control.should_evaluate, self.control.should_save = True, owed["save"]
            self.evaluate()
            if self.control.should_save:
                self.save_checkpoint()
                self.control.should_save = False
        self.control.should_training_stop = self.evaluations_since_best >= self.patience


class _RemainingSteps(Sampler[int]):
    """Indices of the plan's steps from the current one on; of the plan's length, so that the Trainer sees one epoch."""

    def __init__(self, trainer: LoRATrainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.plan)

    def __iter__(self) -> Iterator[int]:
        if not self.trainer.control.should_training_stop:
            yield from range(self.trainer.state.global_step, len(self))


class _Events(TrainerCallback):
    """The trainer's work between its methods."""

    def __init__(self, trainer: LoRATrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        if self.trainer.resumed:
            with self.trainer.resumed.as_files_error():
                self.trainer.restore(self.trainer.resumed)

    def on_epoch_begin(self, args, state, control, **_):
        state.epoch = self.trainer.plan.epoch_at(state.global_step)
        self.trainer.finish_stopped_step()

    def on_step_end(self, args, state, control, **_):
        state.epoch = self.trainer.plan.epoch_at(state.global_step)
        control.should_log |= state.global_step >= state.max_steps  # the last step, whatever logging_steps is
