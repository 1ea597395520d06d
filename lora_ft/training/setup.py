"""A run before its first step: its files, its data, its model, its plan.

`train` uses the parts in order; `check` uses the same parts one by one, so that it refuses what training would refuse.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lora_ft.config.schema import Config
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import info, warn
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.batches import RowPacking, Shard, StepPlan
from lora_ft.data.examples import Examples, largest_id
from lora_ft.data.prepare import prepare, template_of
from lora_ft.distributed import processes
from lora_ft.distributed.sharding import load_sharded
from lora_ft.methods.interface import METHODS, virtual_ids
from lora_ft.methods.trained import Trained, check_base
from lora_ft.model.device import micro_batch_tokens
from lora_ft.model.files import Base, resolve
from lora_ft.model.fits import check_length, check_vocabulary
from lora_ft.model.load import check_quantization, load_base, load_tokenizer, skeleton, tokenizer_hash
from lora_ft.model.stored import stored_dtype
from lora_ft.nn.attention import Isolation
from lora_ft.nn.quantized import number_of_parameters
from lora_ft.training.arguments import arguments
from lora_ft.training.checkpoint import State
from lora_ft.training.resume import check_data, read_state
from lora_ft.training.together import Together


@dataclass
class RunSetup:
    """The parts of a run, each made when first used. before: the record of the `checkpoint` to resume from.

    together: with which runs it is trained; what is the same for all of them is made once. scored: the only eval set that is
    evaluated; others are only held out of train.
    """

    config: Config
    device: str
    trust: Trust = NO_TRUST
    checkpoint: Path | None = None
    before: dict | None = None
    together: Together | None = None
    scored: str | None = None

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        return self.together.once(key, make) if self.together else make()

    @cached_property
    def arguments(self) -> TrainingArguments:
        """The Trainer's settings."""
        return arguments(self.config, self.device)

    # ---- files and data ----

    @cached_property
    def base(self) -> Base:
        """The base's files. Raises ModelError if one is damaged, or if they are not those of the run that is resumed."""
        model, new = self.config.model, tuple(self.config.adapter.add_tokens)
        files = model.name, model.revision, self.trust
        base = self._once(("base", *files, new), lambda: replace(resolve(*files), new_tokens=new))
        stored_dtype(base)  # opens every file of weights
        if model.quantization:
            check_quantization(base, model.quantization)
        if self.before:
            check_base(self.before, base, self.trust.other_base)
        return base

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self._once(("tokenizer", self.base), lambda: load_tokenizer(self.base))

    @cached_property
    def initial_adapter(self) -> Trained | None:
        """What `adapter.init_from` names, checked against the base.

        Raises:
            ModelError: nothing trained there, or by another method, or on another base.
        """
        if not self.config.adapter.init_from:
            return None
        folder, method = Path(self.config.adapter.init_from), self.config.adapter.method
        if not folder.is_dir():
            raise ModelError(f"adapter.init_from: {folder}: no such folder. Give one that a run or PEFT wrote.")
        trained = Trained.open(folder)
        if trained.method != method:
            raise ModelError(f"adapter.init_from: {folder} is of method {trained.method}, this run's is {method}.")
        check_base(trained.record, self.base, self.trust.other_base)
        return trained

    @cached_property
    def dry_run(self) -> tuple[PreTrainedModel, str]:
        """The adapted model on the meta device, with `adapter.init_from` if it fits, and what is adapted: "60 modules"."""
        model = skeleton(self.base)
        with torch.device("meta"):
            adapted = self._inject(model)
            self.load_initial_adapter(model)
        return model, adapted

    @cached_property
    def data(self) -> tuple[Examples, dict[str, Examples]]:
        """The training examples, and the eval sets by name. Raises as `prepare`, and as `check_data` for a resumed run."""
        train_set, eval_sets = prepare(self.config.data, self.tokenizer, self.config.train.seed)
        if self.scored:
            eval_sets = {self.scored: eval_sets[self.scored]}
        if self.before:
            check_data(self.before, tokenizer_hash(self.tokenizer), train_set, eval_sets)
        return train_set, eval_sets

    @property
    def train_set(self) -> Examples:
        return self.data[0]

    @property
    def eval_sets(self) -> dict[str, Examples]:
        return self.data[1]

    def read_files(self) -> None:
        """Download, check and encode: everything before the weights are loaded. Raises as the parts do."""
        _ = self.base, self.tokenizer, self.dry_run, self.data

    # ---- the model and its steps ----

    @property
    def is_sharded(self) -> bool:
        """Whether several processes share the base's layers (`trainer.fsdp`)."""
        return bool(self.config.trainer.fsdp) and processes.world_size() > 1

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base on its device, adapted: what trains requires gradients. It fits tokenizer and examples."""
        settings, load = self.config.model, self.together.load_base if self.together else load_base
        if self.is_sharded:
            load = load_sharded
        model = load(self.base, settings.dtype, self.device, settings.quantization)
        self.check_vocabulary(model)
        self._inject(model)
        self.check_length(model)
        return model

    def _inject(self, model: PreTrainedModel) -> str:
        adapter, seed = self.config.adapter, self.config.train.seed
        return METHODS[adapter.method].inject(model, adapter, seed, self.tokenizer)

    def check_vocabulary(self, model: PreTrainedModel) -> None:
        """Check that the model has an embedding for every id in the data. Raises ModelError."""
        check_vocabulary(model, self.base, max(map(largest_id, [self.train_set, *self.eval_sets.values()])))

    def check_length(self, model: PreTrainedModel) -> None:
        """Check that the model supports the longest example. Raises ConfigError."""
        check_length(model, self.base, self.longest(model))

    def longest(self, model: PreTrainedModel) -> int:
        """Tokens of the longest example, with the model's virtual tokens."""
        return max(e.report.longest for e in (self.train_set, *self.eval_sets.values())) + len(virtual_ids(model))

    def load_initial_adapter(self, model: PreTrainedModel) -> None:
        """Copy the weights of `adapter.init_from`, if there is one, into an adapted model."""
        if self.initial_adapter:
            METHODS[self.initial_adapter.method].load_into(model, self.initial_adapter)

    @cached_property
    def isolation(self) -> Isolation:
        """How the loaded model keeps the examples of a row apart."""
        longest = self.longest(self.model)
        return self._once(("isolation", longest), lambda: Isolation.detect(self.model, longest))

    @cached_property
    def state(self) -> State | None:
        """The checkpoint's state, on every process."""
        needs_best = self.config.train.load_best_model_at_end
        return processes.broadcast(lambda: read_state(self.checkpoint, needs_best) if self.checkpoint else None)

    @cached_property
    def row_tokens(self) -> int:
        """Tokens per row at most; a resumed run with `micro_batch_tokens: auto` keeps the number it started with."""
        if self.state and self.config.train.micro_batch_tokens == "auto":
            return self.state.values["micro_batch_tokens"]
        return micro_batch_tokens(self.config.train.micro_batch_tokens, self.device)

    @cached_property
    def shard(self) -> Shard:
        """Which part of each step this process computes."""
        return Shard(processes.rank(), processes.world_size(), padded=self.is_sharded)

    @cached_property
    def plan(self) -> StepPlan:
        """The run's steps, as the loaded model takes them."""
        return self.make_plan(self.packing, virtual_ids(self.model))

    @cached_property
    def packing(self) -> RowPacking:
        """How rows are made for the loaded model."""
        how = self.isolation, self.row_tokens, self.config.train.share_prefixes == "auto"
        return self._once(("packing", *how), lambda: RowPacking.of(self.model, *how))

    def make_plan(self, packing: RowPacking, prefix: list[int], max_steps: int | None = None) -> StepPlan:
        """The run's steps, or its first `max_steps`, with the ids `prefix` before every example."""
        train = self.config.train
        dataset = self.train_set.with_prefix(prefix).dataset
        length = train.batch_size, train.num_train_epochs, max_steps or train.max_steps
        return StepPlan(dataset, *length, packing, train.seed, self.shard)

    @cached_property
    def chat_template(self) -> str | None:
        """The text of the chat template that the run is trained with; None if it is not trained on chats."""
        data = self.config.data
        return (template_of(data).chat_template or self.tokenizer.chat_template) if data.messages else None

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters of the adapted model."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad), number_of_parameters(self.model)

    def print_summary(self) -> None:
        """Print the data's counts, what is adapted, and how rows are made if not as usual."""
        for name, examples in {"data": self.train_set, **{f"eval {n}": e for n, e in self.eval_sets.items()}}.items():
            info(f"{name.strip()}: {examples.report.summary()}")
            for note in examples.report.notes:
                warn(f"{name.strip()}: {note}.")
        trains, of = self.parameters
        what = f"{self.config.adapter.method}: {self.dry_run[1]}"
        info(f"{what}, {trains:,} trainable parameters ({trains / of:.2%} of the model)")
        if self.isolation is Isolation.ONE_PER_ROW:
            info("this model's RoPE depends on the longest position, so examples cannot share a row (slower)")
