"""How long a run will take: two real steps timed after a warm-up, and some of the eval data, nothing written."""

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from lora_ft.commands.check.display import duration
from lora_ft.config.load import Config
from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.data.examples import Examples
from lora_ft.evaluation.scoring import score
from lora_ft.methods.interface import inject, virtual_ids
from lora_ft.model.device import micro_batch_tokens
from lora_ft.model.files import Base
from lora_ft.model.load import load_base
from lora_ft.nn.attention import Isolation
from lora_ft.training.arguments import arguments
from lora_ft.training.progress import peak_memory_mb
from lora_ft.training.trainer import LoRATrainer

WARM_UP, TIMED, SCORED = 1, 2, 64  # steps, steps, eval examples


@dataclass(frozen=True)
class Timing:
    """seconds_training, seconds_evaluating: of the whole run, by the tokens a second that were measured."""

    tokens_per_second: float
    seconds_training: float
    seconds_evaluating: float
    evaluations: int
    peak_memory_mb: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def lines(self) -> list[str]:
        evaluating = f" and {duration(self.seconds_evaluating)} for {self.evaluations} evaluations"
        return [
            f"about {duration(self.seconds_training)} at {self.tokens_per_second:,.0f} tokens a second"
            + (evaluating if self.evaluations else ""),
            f"measured peak of these {WARM_UP + TIMED} steps: {self.peak_memory_mb:,.0f} MiB",
        ]


class Clock(TrainerCallback):
    """When each step began and ended."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)


def time_steps(
    config: Config,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
    evals: Mapping[str, Examples],
    device: str,
    trust_remote_code: bool,
) -> Timing:
    """Load the model and time it on the run's first steps. Raises as `load_base` and training do."""
    model = load_base(base, config.model.dtype, trust_remote_code, device)
    inject(model, config.adapter, config.train.seed, tokenizer)
    ids = virtual_ids(model)
    train, evals = train.with_prefix(ids), {name: examples.with_prefix(ids) for name, examples in evals.items()}
    isolation = Isolation.detect(model, max(s.report.longest for s in (train, *evals.values())))
    settings = config.train
    row_packing = RowPacking(micro_batch_tokens(config, device), isolation is Isolation.ONE_PER_ROW)

    def plan(steps: int | None) -> StepPlan:
        return StepPlan(
            train.dataset, settings.batch_size, settings.num_train_epochs, steps, row_packing, settings.seed
        )

    timed, whole, clock = plan(WARM_UP + TIMED), plan(settings.max_steps), Clock()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"output": folder, "train": settings.model_copy(update={"report_to": ()})}
        args = arguments(config.model_copy(update=quiet), device)
        args.max_steps, args.save_strategy, args.eval_strategy = len(timed), "no", "no"
        trainer = LoRATrainer(
            model=model,
            args=args,
            plan=timed,
            isolation=isolation,
            evaluation=None,
            save=lambda state, best: None,
            log_line=lambda line: None,
        )
        trainer.add_callback(clock)
        trainer.train_from(None)
    tokens = [timed[i]["tokens"] for i in range(len(timed))]
    speed = sum(tokens[WARM_UP:]) / sum(clock.seconds[WARM_UP:])
    per_epoch = train.report.tokens
    evaluations, evaluating = 0, 0.0
    if evals:
        every = settings.eval_steps if settings.eval_steps >= 1 else math.ceil(settings.eval_steps * len(whole))
        evaluations = settings.evaluate_base + math.ceil(len(whole) / every)  # the last step always is
    for evaluation in evals.values():
        some = evaluation.dataset.select(range(min(SCORED, len(evaluation.dataset))))
        begun = time.perf_counter()
        score(model, some, isolation, row_packing.max_tokens)
        share = int(np.sum(some["tokens"])) / evaluation.report.tokens
        evaluating += evaluations * (time.perf_counter() - begun) / share
    return Timing(
        tokens_per_second=speed,
        seconds_training=per_epoch * len(whole) / whole.steps_per_epoch / speed,
        seconds_evaluating=evaluating,
        evaluations=evaluations,
        peak_memory_mb=peak_memory_mb(torch.device(device)),
    )
