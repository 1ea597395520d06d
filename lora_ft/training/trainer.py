"""The one Trainer subclass: a step is a list of flat micro-batches.

An item of the plan is a whole optimizer step (data/batches.py), so gradient accumulation, batch sizes and epochs are the
plan's and the Trainer sees one long epoch.

Of several processes each has the adapter and computes its share of a step's examples; one sum of the adapter's gradients over
the processes ends the step, so nothing needs to be wrapped around the model and nothing of its size is sent.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_ft.core.signals import Stopped, Stopper
from lora_ft.data.batches import Step, StepPlan
from lora_ft.distributed import processes
from lora_ft.methods.interface import load_into
from lora_ft.methods.lora.inject import trainable
from lora_ft.methods.trained import Trained
from lora_ft.model.device import peak_memory_mb
from lora_ft.nn.attention import Isolation
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.training.checkpoint import Counts, RandomState, State
from lora_ft.training.progress import Bar, LastStep
from lora_ft.training.step import add_gradients, check_finite


class LoRATrainer(Trainer):
    """Trains the adapters of `model` along a plan.

    Args:
        plan: the steps.
        packing: how the model keeps the examples of a row apart.
        evaluation: metrics of the model after a step, without the "eval_" prefix; None without eval data.
        save: makes a checkpoint of a state, given the best step so far.
        log_line: writes a line of the log.
        patience: evaluations without improvement before training stops.
        stopper: its signals stop training between micro-batches.
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
    ):
        self.plan, self.isolation, self.evaluation, self.save, self.log_line = (
            plan,
            isolation,
            evaluation,
            save,
            log_line,
        )
        self.stopper = stopper or Stopper()
        self.counts = Counts()
        self.since = self.started = time.perf_counter()  # since: when the next log line's sums began, pauses left out
        self.patience = patience or 0
        self.early_stopping = EarlyStoppingCallback(patience) if patience else None
        callbacks = [LastStep(), *([self.early_stopping] if self.early_stopping else []), Bar()]
        stand_in = plan if evaluation else None  # the Trainer wants to see a data set; `evaluate` has its own
        if not args.activation_checkpointing:
            keep_gate_and_up(model)
        super().__init__(model=model, args=args, train_dataset=plan, eval_dataset=stand_in, callbacks=callbacks)
        # Keeps DistributedDataParallel off the model: `training_step` sums the gradients.
        self.is_distributed_loading_by_transformers = processes.world_size() > 1
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)

    # ---- a step ----

    def get_train_dataloader(self) -> DataLoader:
        pinned = self.args.device.type == "cuda"  # so that a copy to the GPU waits for nothing
        return DataLoader(self.plan, batch_size=1, shuffle=False, collate_fn=_only, num_workers=0, pin_memory=pinned)

    def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch=None) -> torch.Tensor:
        """Gradients of one whole optimizer step; returns its mean loss per supervised token."""
        if processes.world_size() > 1:  # a function of the step, so that a checkpoint needs no process but the main one
            torch.manual_seed((self.args.seed * 1_000_003 + self.state.global_step) * 65_537 + processes.rank())
        self.generators_before = RandomState.now()  # a step that is broken off is repeated from here
        model.train()
        total = add_gradients(
            self.model,
            self.isolation,
            inputs,
            self.plan.shard,
            self.compute_loss_context_manager,
            self.stopper.check,
        )
        self.step_now, self.step_loss = inputs, total
        return total / max(1, inputs["total"])

    def _get_grad_norm(self, model, grad_norm=None):
        """Called right before the optimizer's step: the last moment to keep NaN and inf out of the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, loss, norm = self.step_now, float(self.step_loss), float(grad_norm)
        check_finite(self.state.global_step + 1, step, loss, norm)
        self.counts.add(loss, step["total"], step["tokens"])
        return norm

    # ---- evaluation, logging ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        assert self.evaluation is not None, "the Trainer evaluates only where there is eval data"
        begun = time.perf_counter()
        metrics = {f"eval_{k}": v for k, v in self.evaluation(self.state.global_step).items()}
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
            logs = logs | self.counts.line(now - self.since)
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device.type)
            self.since = now
        elif "train_runtime" in logs:  # the Trainer's summary at the end; its counts know nothing of the plan
            return
        logs["seconds"] = round(time.perf_counter() - self.started, 3)
        logs["epoch"] = round(self.state.epoch, 6)
        self.log_line({"step": self.state.global_step, **logs})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # ---- checkpoints and stopping ----

    def _save_checkpoint(self, model, trial) -> None:
        begun = time.perf_counter()
        self.checkpoint(RandomState.now())
        self.since += time.perf_counter() - begun

    def checkpoint(self, generators: RandomState) -> None:
        """Save the state after the last whole step; `generators` are those with which the next one begins."""
        state = State.take(self.model, self.optimizer, self.lr_scheduler, self.state, generators)
        state.values |= {
            "counts": asdict(self.counts),
            "seconds": time.perf_counter() - self.started,
            "patience_used": self.early_stopping.early_stopping_patience_counter if self.early_stopping else 0,
            # stopped in the middle of an evaluation: it is owed
            "owed": {"evaluate": self.control.should_evaluate, "save": self.control.should_save},
        }
        self.save(state, self.state.best_global_step)

    def train_from(self, state: State | None, adapter: Path | None = None) -> None:
        """Train to the end of the plan, from the beginning or from a checkpoint's `state` and `adapter` folder.

        Raises:
            Stopped: a signal came. The last whole step is saved, in such a way that going on from it is exact.
        """
        self.resumed, self.resumed_adapter = state, adapter
        self.stopper.deferred = True
        try:
            with tempfile.TemporaryDirectory() as folder, processes.collective():
                if state:  # the Trainer reads its own state from a file
                    (Path(folder) / "trainer_state.json").write_text(json.dumps(state.values["trainer"]))
                self.train(resume_from_checkpoint=folder if state else None)
            self.stopper.check()  # a signal that came with the last step
        except Stopped as stop:
            stop.hint = self.stopper.hint
            if self.state.global_step == 0:
                stop.args = ("stopped before the end of the first step: nothing to save",)
            else:
                owed = self.control.should_evaluate  # then it was an evaluation that was broken off, not a step
                self.checkpoint(RandomState.now() if owed else self.generators_before)
                stop.args = (f"stopped after step {self.state.global_step}, which is saved",)
            raise
        finally:
            self.stopper.deferred = False

    def _run_epoch(self, model, **settings) -> None:
        self._catch_up(model)
        if not self.control.should_training_stop:
            super()._run_epoch(model, **settings)

    def _finalize_training(self, *args, **kwargs):
        self._catch_up(self.model)
        return super()._finalize_training(*args, **kwargs)

    def _catch_up(self, model) -> None:
        """Do the evaluation that a stopped run owes, once; and don't go on where patience had ended."""
        state, self.resumed = self.resumed, None
        if state is None:
            return
        if state.values["owed"]["evaluate"]:
            self.control.should_evaluate, self.control.should_save = True, state.values["owed"]["save"]
            self._maybe_log_save_evaluate(self._tr_loss, None, model, None, 0, None, time.time())
        if self.early_stopping and self.early_stopping.early_stopping_patience_counter >= self.patience:
            self.control.should_training_stop = True

    # What the Trainer would read from its own files (pickles among them) comes from the checkpoint's state.

    def _move_model_to_device(self, model, device) -> None:
        """Nothing: it was loaded where it computes, and a sharded one can't be moved."""

    def _sync_replicated_trainable_parameters(self, model) -> None:
        """Nothing: they begin alike on all processes, and `training_step` keeps them so."""

    def _init_training_state(self, max_steps, *args, **kwargs):
        place = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(
            self.args, max_steps
        )  # logging_steps and the like may have changed, and so may the length
        return place

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        assert self.resumed_adapter is not None
        if processes.is_main():
            load_into(self.model, Trained.open(self.resumed_adapter))
        processes.broadcast_tensors(list(trainable(self.model).values()))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        assert self.resumed is not None
        values = self.resumed.values
        self.resumed.restore_optimizer(self.model, self.optimizer, self.lr_scheduler)
        self.counts = Counts(**values["counts"])
        self.started -= values["seconds"]
        self.generators_resumed = self.resumed.generators()
        if self.early_stopping:
            self.early_stopping.early_stopping_patience_counter = values["patience_used"]

    def _load_scaler(self, checkpoint) -> None:
        pass

    def _load_rng_state(self, checkpoint) -> None:
        self.generators_resumed.restore()


def _only(items: list[Step]) -> Step:
    return items[0]
