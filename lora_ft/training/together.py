"""Several runs in one process, a step of each at a time: every run is its own, and only what the model computes is shared.

Each run is a coroutine (greenlet) that goes through training as it does alone: its own Trainer, optimizer, schedule, log,
checkpoints. Where it needs the gradients of a step, or the log-probabilities of eval data, it waits until all runs that have
not ended wait too. Then all evaluations are computed, or if there are none, a step of each run. So what a run does depends on
no other, and each can be stopped and resumed like any run.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lora_ft.core import messages
from lora_ft.core.errors import ConfigError, NumbersError, UserError
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.data.batches import MicroBatch, Shard, Step
from lora_ft.distributed import processes
from lora_ft.model.files import Base
from lora_ft.model.load import load_base
from lora_ft.nn.attention import Isolation
from lora_ft.nn.forms import Form
from lora_ft.training.joint_rows import RunRows, RunStep
from lora_ft.training.joint_step import JointModel, clone
from lora_ft.training.process_state import ProcessState
from lora_ft.training.progress import BAR


class Abandoned(BaseException):
    """Unwinds a run because of another: that could not begin, or failed in one of several processes."""


class Run:
    """A run among others. name: how its messages begin. error: what ended it, if that was not its end."""

    def __init__(self, number: int, name: str, story: Callable[[], None]):
        self.number, self.name, self.story = number, name, story
        self.coroutine = greenlet(self._tell)
        self.state: ProcessState | None = None
        self.error: BaseException | None = None

    def named_error(self) -> BaseException:
        """The error, whose message says which run it was."""
        assert self.error is not None
        if isinstance(self.error, UserError):
            self.error.add_name(self.name)
        return self.error

    def _tell(self) -> None:
        try:
            self.story()
        except NumbersError as error:  # its traceback would keep the run's Trainer in memory
            self.error = error.with_traceback(None)
        except BaseException as error:  # signals too: the other runs hear of them on their own
            self.error = error


class Together:
    """Trains runs together.

    Args:
        stopper: entered by the caller; its signals reach every run.
        count: of the runs.
    """

    def __init__(self, stopper: Stopper, count: int):
        self.stopper, self.count = stopper, count
        self._scheduler: greenlet = getcurrent()
        self._prefix = messages.prefix()
        self._running: Run | None = None
        self._waiting: dict[Run, RunRows | None] = {}
        self._base: PreTrainedModel | None = None
        self._made: dict[Hashable, Any] = {}
        self._models: dict[int, PreTrainedModel] = {}
        self._joint: JointModel | None = None
        self._isolation, self._bf16 = Isolation.ONE_PER_ROW, False
        self._steps = 0

    # ---- for a run ----

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned for the first run that asked for `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def load_base(self, base: Base, dtype: str, device: str, quantization: Form | None) -> PreTrainedModel:
        """The base, read once for all runs; each gets a model of its own over the same weights."""
        if self._base is None:
            self._base = load_base(base, dtype, device, quantization)
        return clone(self._base)

    def wait_for_others(self, model: PreTrainedModel, steps: int, isolation: Isolation, bf16: bool) -> None:
        """Wait until every run can begin; `model` is that of this one, which has `steps` to do. bf16: as of all the others."""
        assert self._running is not None
        self._models[self._running.number] = model
        self._isolation, self._bf16 = isolation, bf16
        self._steps += steps
        self._scheduler.switch(None)

    def add_gradients(
        self, model: PreTrainedModel, isolation: Isolation, step: Step, shard: Shard, check: Callable[[], None]
    ) -> Tensor:
        """As `training.step.add_gradients`, but computed with the steps of the other runs, which check for signals."""
        assert self._running is not None
        return self._scheduler.switch(
            RunStep(self._running.number, isolation, step["micro"], model, step["total"], shard)
        )

    def log_probabilities(self, isolation: Isolation, rows: Iterable[MicroBatch]) -> list[Tensor]:
        """What `nn.loss.log_probabilities` gives for each row, but computed with the rows that other runs evaluate."""
        assert self._running is not None
        return self._scheduler.switch(RunRows(self._running.number, isolation, [*rows]))

    # ---- the runs ----

    def train(
        self, stories: Sequence[tuple[str, Callable[[], None]]], row_tokens: int | str, checkpointing: bool
    ) -> list[Run]:
        """Carry out the runs by their names, with rows of at most `row_tokens`; all of them as they ended.

        Raises:
            Exception, Stopped: a run could not begin; none did. Or one of several processes failed, and with it all runs.
        """
        runs = [Run(number, name, story) for number, (name, story) in enumerate(stories)]
        self.stopper.deferred = True
        try:
            waiting = self._start(runs)
            self._join(waiting, row_tokens, checkpointing)
            self._waiting = dict.fromkeys(waiting)
            self._advance(dict.fromkeys(waiting))
            with tqdm(total=self._steps, desc="training", bar_format=BAR, disable=None) as bar:
                while self._waiting:
                    answers = self._compute()
                    bar.update(sum(isinstance(loss, Tensor) for loss in answers.values()))  # not of evaluations
                    self._advance(answers)
        finally:
            self.stopper.deferred = False
        return runs

    def _start(self, runs: Sequence[Run]) -> list[Run]:
        """Let each run come to its beginning; those that wait there, others being finished already."""
        waiting: list[Run] = []
        for run in runs:
            self._switch(run, None)
            if run.error:
                self._abandon(waiting)
                raise run.named_error()
            if not run.coroutine.dead:
                waiting.append(run)
        return waiting

    def _join(self, runs: Sequence[Run], row_tokens: int | str, checkpointing: bool) -> None:
        """Make the model of the runs that are to be trained."""
        if not runs:
            return
        assert self._base is not None
        models = {run.number: self._models[run.number] for run in runs}
        try:
            self._joint = JointModel(self._base, models, row_tokens, checkpointing, self._bf16)
            self._joint.check(self._isolation)
        except ConfigError:
            self._abandon(runs)
            raise

    def _abandon(self, runs: Iterable[Run]) -> None:
        """End runs because of another; they let go of their outputs."""
        for run in runs:
            self._switch(run, Abandoned())

    def _advance(self, answers: dict[Run, Any]) -> None:
        """Give runs what they wait for, until each has ended or waits again."""
        for run, answer in answers.items():
            self._waiting[run] = self._switch(run, answer)
            self.stopper.keep_running()
            if not run.coroutine.dead:
                continue
            del self._waiting[run]
            if isinstance(run.error, Exception):
                if processes.world_size() > 1 and not isinstance(run.error, NumbersError):
                    self._abandon([*self._waiting])
                    raise run.named_error()  # of this process: the others would go on with the run
                what = run.error if isinstance(run.error, UserError) else f"{type(run.error).__name__}: {run.error}"
                messages.info(f"{run.name}: {what}")

    def _compute(self) -> dict[Run, Any]:
        """What the runs that evaluate wait for, or else all runs; or the error that each is to hear of."""
        assert self._joint is not None
        steps = {run: rows for run, rows in self._waiting.items() if isinstance(rows, RunStep)}
        evaluations = {run: rows for run, rows in self._waiting.items() if rows and run not in steps}
        answered = evaluations or steps
        try:
            if evaluations:
                found: dict[int, Any] = self._joint.log_probabilities([*evaluations.values()], self.stopper.check)
            else:
                found = self._joint.add_gradients([*steps.values()], self.stopper.check)
        except Stopped as stop:
            return {run: _copy(stop) for run in answered}
        except Exception as error:
            return dict.fromkeys(answered, error)
        for run, rows in answered.items():
            if isinstance(rows, RunStep):
                assert run.state is not None
                run.state.random.tensors |= {f"random.{kind}": state for kind, state in rows.generators.states.items()}
        return {run: found[run.number] for run in answered}

    def _switch(self, run: Run, answer: Any) -> Any:
        """Let a run go on with an answer, or with an error raised where it waits; what it waits for next."""
        outside = ProcessState.current(self.stopper)
        if run.state:
            run.state.restore(self.stopper)
        else:
            self.stopper.deferred = False
            messages.set_prefix(f"{self._prefix}{run.name}: ")
        self._running = run
        try:
            if isinstance(answer, BaseException):
                return run.coroutine.throw(answer)
            return run.coroutine.switch() if answer is None else run.coroutine.switch(answer)
        finally:
            self._running = None
            run.state = ProcessState.current(self.stopper)
            outside.restore(self.stopper)


def _copy(stop: Stopped) -> Stopped:
    """The same stop for another run, which adds what became of it."""
    copy = Stopped(stop.exit_code - 128)
    copy.__cause__ = stop.__cause__
    return copy
