"""Everything `train` would do before its first step, with errors collected instead of raised."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from lora_ft.commands.check import warnings
from lora_ft.commands.check.forecast import forecast
from lora_ft.commands.check.memory import Memory, estimate, largest_rows, moments_of
from lora_ft.commands.check.timing import Timing, time_steps
from lora_ft.config.learning_rate import passes_of_trials
from lora_ft.config.schema import Config
from lora_ft.core.errors import ModelError, UserError
from lora_ft.core.machine import resident_memory
from lora_ft.core.messages import format_bytes, working
from lora_ft.core.trust import Trust
from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.evaluation.references import eval_prompts
from lora_ft.evaluation.texts import check_installed
from lora_ft.methods.interface import METHODS, virtual_ids
from lora_ft.model.device import OWN_MEMORY, free_memory, prepare_device
from lora_ft.model.load import check_weights, dtype_of, skeleton
from lora_ft.model.quantize import quantize
from lora_ft.nn.attention import Isolation
from lora_ft.report.figures import format_duration
from lora_ft.training import resume
from lora_ft.training.output import check_writable
from lora_ft.training.setup import RunSetup


@dataclass
class Inspection:
    """What is known of a run; None or empty where an error prevented it."""

    setup: RunSetup
    has_data: bool = False
    model: PreTrainedModel | None = None  # the adapted model without weights
    adapted: str = ""  # what of it is adapted, in words
    plan: StepPlan | None = None
    memory: Memory | None = None
    seconds: float | None = None  # a forecast of the run, see `forecast`
    timing: Timing | None = None
    ends_learned: int = 0  # training examples that end in a supervised end token
    in_common: dict[str, int] = field(default_factory=dict)  # eval set -> its examples that are also training examples
    warnings: list[str] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)

    def rough_time(self) -> str:
        """The forecast in words: `roughly 20 min, with the trials of learning rates`."""
        rows = self.setup.train_set.report.used
        tried, _ = passes_of_trials(self.setup.config, len(self.plan or ()), rows)
        return f"roughly {format_duration(self.seconds or 0)}{', with the trials of learning rates' if tried else ''}"

    @contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Keep a user error that is raised within, and continue after the block."""
        try:
            yield
        except UserError as e:
            self.errors.append(e)


def inspect_run(config: Config, time: bool, trust: Trust) -> Inspection:
    """Touch every part of a run in the order in which `train` does; `time` measures two steps as well."""
    output = Path(config.output)
    result = Inspection(RunSetup(config, "cpu", trust))
    setup, holds_run = result.setup, False
    with result.collect_errors():
        check_writable(output)
        resume.find_starting_point(output, config, resume=False, overwrite=True)  # a run in it is only a warning here
        holds_run = resume.holds_run(output)
    with result.collect_errors():
        setup.device = prepare_device(config.trainer.use_cpu)
        _ = setup.arguments
    with result.collect_errors():
        if config.train.predict_with_generate:
            check_installed(config.generation.metrics)
    with result.collect_errors():
        _ = setup.tokenizer
    if result.errors and not ("base" in vars(setup) and "tokenizer" in vars(setup)):
        return result
    with result.collect_errors():
        result.model, result.adapted = setup.dry_run
        check_weights(setup.base)
    with result.collect_errors():
        _ = setup.data
        result.has_data = True
    if result.has_data:
        own = result.model.generation_config if result.model else GenerationConfig()
        result.ends_learned, result.in_common, result.warnings = warnings.examine_data(setup, own)
        if holds_run:
            result.warnings.append(f"output {output}: {resume.HOLDS_RUN}")
        isolation = Isolation.ATTENTION
        if result.model:
            isolation = Isolation.guess_from_config(result.model, setup.longest(result.model))
        share = config.train.share_prefixes == "auto" and isolation is Isolation.ATTENTION
        packing = RowPacking(setup.row_tokens, isolation is Isolation.ONE_PER_ROW, share)
        result.plan = setup.make_plan(packing, [])
    if result.model and result.plan:
        with result.collect_errors():
            setup.check_vocabulary(result.model)
        with result.collect_errors():
            setup.check_length(result.model)
        with result.collect_errors():
            for examples in setup.eval_sets.values() if config.train.predict_with_generate else ():
                eval_prompts(result.model, setup.tokenizer, examples, config)
        with result.collect_errors():
            result.seconds = forecast(setup, result.model, result.plan)
        if "arguments" in vars(setup):
            with working("estimating the memory"):
                _inspect_memory(result, result.model, result.plan)
        if time and not result.errors:
            task = "timing three steps and a part of an evaluation"
            with result.collect_errors(), working(task):  # errors such as weights of NaN
                result.timing = time_steps(setup)
    return result


def _inspect_memory(result: Inspection, model: PreTrainedModel, plan: StepPlan) -> None:
    """The memory estimate, and a warning where it is more than there is."""
    setup, config, device = result.setup, result.setup.config, result.setup.device
    dtype = dtype_of(setup.base, config.model.dtype, device)
    runtime = 0 if device in OWN_MEMORY else resident_memory()

    def build() -> PreTrainedModel:
        model = quantize(skeleton(setup.base, device=device, dtype=dtype), config.model.quantization)
        METHODS[config.adapter.method].inject(model, config.adapter, config.train.seed, setup.tokenizer)
        return model

    try:
        result.memory = estimate(
            build,
            largest_rows(plan, len(virtual_ids(model))),
            checkpointing=config.train.gradient_checkpointing,
            autocast=torch.bfloat16 if setup.arguments.bf16 else None,
            moments=moments_of(setup.arguments),
            runtime=runtime,
        )
    except ModelError as e:  # training may well work
        result.warnings.append(f"{e} --time measures it.")
        return
    free = free_memory(device) + (0 if device in OWN_MEMORY else resident_memory())
    if result.memory.total > free:
        result.warnings.append(
            f"memory: training needs {format_bytes(result.memory.total)}, and {format_bytes(free)} are free. Lower "
            "train.micro_batch_tokens or data.max_length, or set train.gradient_checkpointing or model.quantization."
        )
