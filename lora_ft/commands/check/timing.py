"""How long a run will take: two real steps are timed after a warm-up, and a part of an evaluation; nothing is written."""

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from lora_ft.config.learning_rate import passes_of_trials
from lora_ft.config.schema import Config
from lora_ft.core.paths import temporary_folder
from lora_ft.data.examples import Examples
from lora_ft.evaluation.references import eval_prompts
from lora_ft.evaluation.scoring import score
from lora_ft.evaluation.texts import generate_texts
from lora_ft.methods.interface import virtual_ids
from lora_ft.model.device import peak_memory_mb
from lora_ft.report.figures import format_duration
from lora_ft.training.arguments import arguments
from lora_ft.training.setup import RunSetup
from lora_ft.training.trainer import LoRATrainer

WARM_UP, TIMED, SCORED = 1, 2, 64  # steps, steps, eval examples


@dataclass(frozen=True)
class Timing:
    """A forecast of the complete run, and in `tokens_per_second` and `peak_memory_mb` (MiB) what was measured."""

    tokens_per_second: float
    seconds_training: float
    seconds_evaluating: float
    evaluations: int
    peak_memory_mb: float
    seconds_trying: float = 0.0  # learning rates, before the run

    def lines(self) -> list[str]:
        """For people."""
        evaluating = f" and {format_duration(self.seconds_evaluating)} for {self.evaluations} evaluations"
        training = f"about {format_duration(self.seconds_training)} at {self.tokens_per_second:,.0f} tokens per second"
        trying = f", and {format_duration(self.seconds_trying)} to try learning rates"
        memory = f"measured peak memory of these {WARM_UP + TIMED} steps: {self.peak_memory_mb:,.0f} MiB"
        parts = training, evaluating * bool(self.evaluations), trying * bool(self.seconds_trying)
        return [f"  {''.join(parts)}", f"  {memory}"]


def time_steps(setup: RunSetup) -> Timing:
    """Load the model and time the run's first steps and part of an evaluation. Raises as `RunSetup.model` and training do."""
    config, model, isolation, prefix = setup.config, setup.model, setup.isolation, virtual_ids(setup.model)
    complete, timed = setup.plan, setup.make_plan(setup.packing, prefix, WARM_UP + TIMED)
    settings = config.train
    clock: list[float] = []  # the time after each step
    with temporary_folder() as folder:
        train = settings.model_copy(update={"report_to": (), "logging_steps": 1})
        args = arguments(config.model_copy(update={"output": folder, "train": train}), setup.device)
        args.max_steps, args.save_strategy, args.eval_strategy = len(timed), "no", "no"
        trainer = LoRATrainer(
            model=model,
            args=args,
            plan=timed,
            isolation=isolation,
            evaluation=None,
            save=lambda state, best: None,
            log_line=lambda line: clock.append(time.perf_counter()),
        )
        trainer.train_from(None)
    speed = sum(timed[i]["tokens"] for i in range(WARM_UP, len(timed))) / (clock[-1] - clock[WARM_UP - 1])
    evaluations, evaluating = evaluations_of(setup, len(complete)), 0.0
    for examples in setup.eval_sets.values():
        some = examples.with_prefix(prefix).dataset.select(range(min(SCORED, len(examples.dataset))))
        started = time.perf_counter()
        score(model, some, isolation, setup.packing)
        share = int(np.sum(some["tokens"])) / examples.report.tokens
        evaluating += evaluations * (time.perf_counter() - started) / share
        if settings.predict_with_generate:
            evaluating += evaluations * _seconds_generating(setup, examples, prefix)
    training = setup.train_set.report.tokens * len(complete) / complete.steps_per_epoch / speed
    tried, scored = passes_of_trials(config, len(complete), setup.train_set.report.used)
    scoring = scored * setup.train_set.report.tokens / speed / products_of_step(config)
    trying = tried * training + scoring
    return Timing(speed, training, evaluating, evaluations, peak_memory_mb(setup.device), trying)


def products_of_step(config: Config) -> int:
    """How many products of a layer's weight a step takes for each token, where scoring takes one."""
    return 2 + (config.adapter.method == "full") + config.train.gradient_checkpointing


def evaluations_of(setup: RunSetup, steps: int) -> int:
    """How often a run scores its eval sets: the base, at the start, after every interval and the last step."""
    if not setup.eval_sets:
        return 0
    settings, trainer = setup.config.train, setup.config.trainer
    every = int(settings.eval_steps) if settings.eval_steps >= 1 else math.ceil(settings.eval_steps * steps)
    after = {step for step in range(every, steps + 1, every) if step >= (trainer.eval_delay or 0)} | {steps}
    return settings.evaluate_base + bool(trainer.eval_on_start) + len(after)


def _seconds_generating(setup: RunSetup, examples: Examples, prefix: list[int]) -> float:
    """How long the texts of one evaluation take, from one batch of them."""
    prompts = eval_prompts(setup.model, setup.tokenizer, examples, setup.config).with_prefix(prefix)
    count = min(setup.config.generation.batch_size, len(prompts.ids))
    some = replace(prompts, texts=prompts.texts[:count], ids=prompts.ids[:count])
    started = time.perf_counter()
    generate_texts(setup.model, setup.tokenizer, some, setup.config)
    return (time.perf_counter() - started) * math.ceil(len(prompts.ids) / count)
