"""What is to be known of a run before it begins, found by the functions that `train` uses, in the order it uses them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lora_ft.commands.check import display, warnings
from lora_ft.commands.check.memory import Memory, available, estimate, largest_rows, moments_of, resident
from lora_ft.commands.check.timing import Timing, time_steps
from lora_ft.commands.train import dry_run
from lora_ft.config.load import Config
from lora_ft.core import run_folder
from lora_ft.core.errors import ModelError, UserError
from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.data.examples import Examples, largest_id
from lora_ft.data.prepare import prepare
from lora_ft.evaluation.texts import check_installed, questions_for
from lora_ft.methods.interface import inject, virtual_ids
from lora_ft.model.device import micro_batch_tokens, prepare_device
from lora_ft.model.files import Base, resolve, weight_files
from lora_ft.model.load import check_length, check_vocabulary, dtype_of, end_tokens, load_tokenizer, skeleton
from lora_ft.nn.attention import Isolation
from lora_ft.training import resume
from lora_ft.training.arguments import arguments


@dataclass
class Looked:
    """What was found out; what could not be is None, and why is in errors."""

    config: Config
    device: str = "cpu"
    args: TrainingArguments | None = None
    base: Base | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    model: PreTrainedModel | None = None  # adapted, without weights
    adapted: str = ""  # what of it, in words
    train: Examples | None = None
    eval: dict[str, Examples] = field(default_factory=dict)  # by name, as `prepare` has them
    plan: StepPlan | None = None
    memory: Memory | None = None
    timing: Timing | None = None
    ends_learned: int = 0
    in_common: dict[str, int] = field(default_factory=dict)  # of each eval set, with the training examples
    warnings: list[str] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """What is refused within is kept, and the rest goes on."""
        try:
            yield
        except UserError as e:
            self.errors.append(e)


def look(config: Config, time: bool, other_base: bool, trust_remote_code: bool, allow_pickle: bool) -> Looked:
    """Everything, in the order in which `train` would come to it."""
    found = Looked(config)
    with found.attempt():
        run_folder.check_writable(Path(config.output))
        resume.find_starting_point(Path(config.output), config, resume=False, overwrite=False)
    with found.attempt():
        found.device = prepare_device(config)
        found.args = arguments(config, found.device)
    with found.attempt():
        if config.train.predict_with_generate:
            check_installed(config.generation.metrics)
    with found.attempt():
        found.base = resolve(config.model.name, config.model.revision, allow_pickle)
        if not found.base.gguf and not found.base.pickles:
            weight_files(found.base)
        found.tokenizer = load_tokenizer(found.base, trust_remote_code)
    if not found.base or not found.tokenizer:
        return found
    with found.attempt():
        found.model, found.adapted = dry_run(config, found.base, found.tokenizer, other_base, trust_remote_code)
    with found.attempt():
        found.train, found.eval = prepare(config.data, found.tokenizer, config.train.seed)
    if found.train:
        look_at_data(found, found.train, found.tokenizer, end_tokens(found.base, found.tokenizer))
        found.plan = plan_of(found, found.train, alone=False)
    if found.train and found.model:
        sets = [found.train, *found.eval.values()]
        longest = max(examples.report.longest for examples in sets) + len(virtual_ids(found.model))
        with found.attempt():
            check_vocabulary(found.model, found.base, max(map(largest_id, sets)))
        with found.attempt():
            check_length(found.model, found.base, longest)
        alone = Isolation.guess_from_config(found.model, longest) is Isolation.ONE_PER_ROW
        found.plan = plan_of(found, found.train, alone)
        with found.attempt():
            for examples in found.eval.values() if config.train.predict_with_generate else ():
                questions_for(found.model, found.tokenizer, examples, config)
        if found.args and found.plan:
            look_at_memory(found, found.base, found.model, found.args, found.plan, trust_remote_code)
        if time and found.plan and not found.errors:
            found.timing = time_steps(
                config, found.base, found.tokenizer, found.train, found.eval, found.device, trust_remote_code
            )
    return found


def look_at_data(found: Looked, train: Examples, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    found.ends_learned = warnings.ends_learned(train, ends)
    found.in_common = {name: warnings.in_common(train, examples) for name, examples in found.eval.items()}
    found.warnings += warnings.data_warnings(
        found.config.data, train, found.eval, ends, found.ends_learned, found.in_common, tokenizer
    )


def plan_of(found: Looked, train: Examples, alone: bool) -> StepPlan:
    """The steps of the run; alone: one example a row."""
    config, cut = found.config.train, RowPacking(micro_batch_tokens(found.config, found.device), alone)
    return StepPlan(train.dataset, config.batch_size, config.num_train_epochs, config.max_steps, cut, config.seed)


def look_at_memory(
    found: Looked, base: Base, model: PreTrainedModel, args: TrainingArguments, plan: StepPlan, trust_remote_code: bool
) -> None:
    """The memory estimate, and a warning where it is more than there is."""
    config, device, tokenizer = found.config, found.device, found.tokenizer
    assert tokenizer
    dtype = dtype_of(base, config.model.dtype, device)
    runtime = 0 if device == "cuda" else resident()

    def build() -> PreTrainedModel:
        model = skeleton(base, trust_remote_code, device=device, dtype=dtype)
        inject(model, config.adapter, config.train.seed, tokenizer)
        return model

    try:
        found.memory = estimate(
            build,
            largest_rows(plan, len(virtual_ids(model))),
            checkpointing=config.train.gradient_checkpointing,
            autocast=torch.bfloat16 if args.bf16 else None,
            moments=moments_of(args),
            runtime=runtime,
        )
    except ModelError as e:  # training may well work
        found.warnings.append(f"{e} --time measures it.")
        return
    free = available(device) + (0 if device == "cuda" else resident())
    if free and found.memory.total > free:
        found.warnings.append(
            f"memory: training needs {display.size(found.memory.total)}, and {display.size(free)} are free. Lower "
            "train.micro_batch_tokens or data.max_length, or set train.gradient_checkpointing or model.dtype: bfloat16."
        )
