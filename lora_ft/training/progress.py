"""What a person sees of a training run while it goes on."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from tqdm import tqdm
from transformers import TrainerCallback

from lora_ft.core.messages import info
from lora_ft.core.metrics import format_metrics


class LastStep(TrainerCallback):
    """The plan's last step is logged whatever logging_steps is."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= state.max_steps:
            control.should_log = True


class Bar(TrainerCallback):
    """A progress bar with loss, tokens per second and time left; without a terminal a line at every tenth of the run.

    Evaluations leave a line anywhere.
    """

    def on_train_begin(self, args, state, control, **_):
        # disable=None: on a terminal only
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None)
        self.said, self.first, self.begun = state.global_step, state.global_step, time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        shown = f"loss {logs['loss']:.4f}, {logs['tokens_per_second']:.0f} tokens/s"
        self.bar.set_postfix_str(shown)
        if self.bar.disable and state.global_step - self.said >= state.max_steps / 10:
            self.said = state.global_step
            pace = (time.perf_counter() - self.begun) / (state.global_step - self.first)
            left = tqdm.format_interval(pace * (state.max_steps - state.global_step))
            info(f"step {state.global_step} of {state.max_steps}: {shown}, {left} left")

    def on_evaluate(self, args, state, control, metrics=None, **_):
        shown = format_metrics({key.removeprefix("eval_"): value for key, value in metrics.items()})
        self.bar.clear()
        info(f"step {state.global_step} of {state.max_steps}, eval: {shown}")
        self.bar.refresh()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


@contextmanager
def trackers(report_to: Sequence[str]) -> Iterator[None]:
    """While a run reports: what trackers print goes to stderr, and W&B's run ends with ours, not with the process."""
    failed = True
    try:
        with redirect_stdout(sys.stderr):
            yield
        failed = False
    finally:
        if "wandb" in report_to:
            import wandb

            wandb.finish(exit_code=int(failed))
