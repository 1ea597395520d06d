"""Progress of a training run on stderr, and the trackers it reports to."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from lora_ft.core.errors import FilesError
from lora_ft.core.messages import info
from lora_ft.core.metrics import format_metrics

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # speed is in the lines


class ProgressBar(TrainerCallback):
    """A line per tenth of the run and one per evaluation; on a terminal a bar too, if it `draws`."""

    def __init__(self, draws: bool = True):
        self.draws = draws
        self.bar: tqdm | None = None  # from the beginning of training on

    def on_train_begin(self, args, state, control, **_):
        hidden = None if self.draws else True  # None: shown on a terminal only
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", bar_format=BAR, disable=hidden
        )
        self.first_step = self.printed_step = state.global_step
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        assert self.bar is not None
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        assert self.bar is not None
        loss = f"loss {logs['loss']:.4f}"
        self.bar.set_postfix_str(loss)
        if state.global_step - self.printed_step >= state.max_steps / 10:
            self.printed_step = state.global_step
            seconds_per_step = (time.perf_counter() - self.started) / (state.global_step - self.first_step)
            left = tqdm.format_interval(seconds_per_step * (state.max_steps - state.global_step))
            self._line(state, f": {loss}, {logs['tokens_per_second']:.0f} tokens/s, {left} left")

    def on_evaluate(self, args, state, control, metrics=None, **_):
        scores = format_metrics({key.removeprefix("eval_"): value for key, value in metrics.items()})
        self._line(state, f", eval: {scores}")

    def _line(self, state, text: str) -> None:
        info(f"step {state.global_step} of {state.max_steps}{text}")

    def close(self) -> None:
        """Leave the bar as it is, however training ended."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def trackers(report_to: Sequence[str], output: Path) -> Iterator[None]:
    """Redirect the trackers' output to stderr, and end the W&B run together with this one, not with the process.

    Raises:
        FilesError: TensorBoard can't write below `output`. A thread of its own does, and passes the error on.
    """
    failed, of_threads, hook = True, [], threading.excepthook
    threading.excepthook = lambda thread: of_threads.append(thread.exc_value)  # else it prints a traceback
    try:
        with redirect_stdout(sys.stderr):
            yield
        failed = False
    except OSError as e:
        if e not in of_threads:
            raise
        raise FilesError(f"{output / 'tensorboard'}: can't be written ({e.strerror}). Free some space.") from e
    finally:
        threading.excepthook = hook
        if "wandb" in report_to:
            import wandb

            wandb.finish(exit_code=int(failed))
