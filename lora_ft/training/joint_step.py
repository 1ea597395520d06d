"""An optimizer step of several runs at once: their micro-batches share rows of one model (nn/joint.py).

A run's gradients are those of `add_gradients` in a run alone, except for rounding: its micro-batches are cut as there, keep
their order, and draw from its own generators.
"""

import copy
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import first_line
from lora_ft.data.batches import MicroBatch, Shard, Step
from lora_ft.distributed import processes
from lora_ft.methods.lora.inject import lora_layers, trainable
from lora_ft.methods.lora.multi import is_expert
from lora_ft.model.device import micro_batch_tokens, random_states, set_random_states
from lora_ft.nn.attention import Isolation
from lora_ft.nn.joint import JointLoRALinear, Part, parts_of_row
from lora_ft.nn.loss import supervised_losses
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.nn.rows import Segment

ENOUGH = {"cpu": 320}  # tokens of a row: longer ones take more memory than they save time (docs/training.md)


class RunGenerators:
    """torch's random generators as a run left them; within `drawing` torch draws from them."""

    def __init__(self) -> None:
        self.states = random_states()
        self._before: dict[Hashable, dict[str, Tensor]] = {}

    def start_row(self) -> None:
        """Forget what was drawn: the next row draws again."""
        self._before.clear()

    @contextmanager
    def drawing(self, what: Hashable) -> Iterator[None]:
        """Draw from the run's generators; the second time in a row for the same `what`, the same again."""
        others, again = random_states(), what in self._before
        set_random_states(self._before.setdefault(what, self.states))
        try:
            yield
        finally:
            if not again:
                self.states = random_states()
            set_random_states(others)


@dataclass
class RunStep:
    """A step that a run waits for. generators: as the run left them."""

    run: int
    model: PreTrainedModel
    isolation: Isolation
    step: Step
    shard: Shard
    generators: RunGenerators = field(default_factory=RunGenerators)


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with the same weights in memory, so that it can be adapted on its own."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


class JointModel:
    """One base under the adapters of several runs, whose own models are clones of it.

    row_tokens: the setting train.micro_batch_tokens. bf16: the setting of the Trainer, which has accelerate
    wrap a run's own model so.

    Raises:
        ConfigError: as `check_joint`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        models: Mapping[int, PreTrainedModel],
        row_tokens: int | str,
        checkpointing: bool,
        bf16: bool = False,
    ):
        self.model, device = clone(base), base.device.type
        if bf16:
            forward = torch.autocast(device, torch.bfloat16)(type(self.model).forward)
            self.model.forward = MethodType(convert_outputs_to_fp32(forward), self.model)
        self.row_tokens = row_limit(row_tokens, device)
        layers = {run: lora_layers(model) for run, model in models.items()}
        paths = [*dict.fromkeys(path for own in layers.values() for path in own)]
        check_joint(base, paths, checkpointing)
        for path in paths:
            own = {run: of_run[path] for run, of_run in layers.items() if path in of_run}
            self.model.set_submodule(path, JointLoRALinear(base.get_submodule(path), own))
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        else:
            keep_gate_and_up(self.model)

    def add_gradients(self, steps: Sequence[RunStep], check: Callable[[], None]) -> dict[int, Tensor]:
        """Add the gradients of each run's mean loss to those of its parameters, equally on every process.

        check: called before each row; may raise to stop. Returns the runs' losses as `training.step.add_gradients` does.
        """
        self.model.train()
        totals = {s.run: torch.zeros((), device=self.model.device) for s in steps}
        for row in rows(steps, self.row_tokens):
            check()
            try:
                losses = self._losses_of_row(row)
            except NotImplementedError as e:
                raise ConfigError(f"this model can't be trained with several configs at a time: {first_line(e)}") from e
            for run, loss in losses.items():
                totals[run] += loss
        check()
        for s in steps:
            if s.shard.world_size > 1:
                processes.all_reduce_gradients(list(trainable(s.model).values()), totals[s.run])
        return totals

    def _losses_of_row(self, row: Sequence[tuple[RunStep, MicroBatch]]) -> dict[int, Tensor]:
        """Compute a row and its gradients; the loss of each run, summed over its supervised tokens in the row."""
        parts, token, segment = [], 0, 0
        segments: list[Segment] = []
        for s, micro in row:
            s.generators.start_row()
            tokens = tokens_of(micro)
            parts.append(Part(s.run, slice(token, token + tokens), s.generators.drawing))
            segments += [Segment(n, None if parent is None else parent + segment) for n, parent in micro["segments"]]
            token, segment = token + tokens, len(segments)
        starts = [part.tokens.start for part in parts]
        joined = {
            "input_ids": torch.cat([micro["input_ids"] for _, micro in row], 1),
            "position_ids": torch.cat([micro["position_ids"] for _, micro in row], 1),
            "keep": torch.cat([micro["keep"] + start for (_, micro), start in zip(row, starts, strict=True)]),
            "targets": torch.cat([micro["targets"] for _, micro in row]),
        }
        inputs = {key: x.to(self.model.device, non_blocking=True) for key, x in joined.items()}
        counts = [len(micro["keep"]) for _, micro in row]
        outside = random_states()
        with row[0][0].isolation.row(self.model, segments), parts_of_row(parts):
            losses = supervised_losses(self.model, **inputs, counts=counts)
            means = [loss / max(1, s.step["total"]) for (s, _), loss in zip(row, losses, strict=True)]
            torch.stack(means).sum().backward()
        if any(not torch.equal(state, outside.get(kind, state)) for kind, state in random_states().items()):
            raise NotImplementedError("it draws random numbers that belong to no run")
        return {s.run: loss.detach() for (s, _), loss in zip(row, losses, strict=True)}


def check_joint(base: PreTrainedModel, adapted: Iterable[str], checkpointing: bool) -> None:
    """Refuse runs that can't be computed together on this base, of which they adapt these modules.

    Raises:
        ConfigError: they adapt experts; or the base has dropout of its own, and its layers are to be computed again.
    """
    if any(map(is_expert, adapted)):  # whose input is some of a row's tokens, in another order
        raise ConfigError("adapter.targets: runs that adapt experts can't be trained together. Train them one by one.")
    has_dropout = any(
        "drop" in key and isinstance(value, float) and value > 0
        for key, value in base.config.get_text_config().to_dict().items()
        if not key.startswith(("classifier_", "summary_"))  # of heads that a language model has not
    )
    if checkpointing and has_dropout:
        raise ConfigError(
            "train.gradient_checkpointing is not supported for several configs of a model that has dropout of its own. Set it "
            "to false, or train them one by one."
        )


def row_limit(setting: int | str, device: str) -> int:
    """The most tokens of several runs in a row, unless a run has a longer one alone."""
    return min(micro_batch_tokens(setting, device), ENOUGH.get(device, sys.maxsize))


def rows(steps: Sequence[RunStep], most: int) -> list[list[tuple[RunStep, MicroBatch]]]:
    """The runs' micro-batches in as few rows as their sizes allow: in each at most one of a run, and a run's in their order.

    A row has at most `most` tokens, or as many as the longest that a run has alone. Among as few, the longest has few tokens.
    """
    own = [(s, [m for m in s.step["micro"] if len(m["keep"])]) for s in steps]
    sizes = [tokens_of(m) for _, micro in own for m in micro]
    high = max(most, *sizes, 0)
    joined = _first_fit(own, high)
    low = max(*sizes, math.ceil(sum(sizes) / max(1, len(joined))), 0)
    while low < high:
        middle = (low + high) // 2
        even = _first_fit(own, middle)
        if len(even) <= len(joined):
            joined, high = even, middle
        else:
            low = middle + 1
    return joined


def _can_share_row(a: RunStep, b: RunStep) -> bool:
    """Whether two runs can have a row in common.

    Not by a mask, which hides the tokens of others by weights of 0: 0 times a number that is not finite is not 0, and a run of
    which one is so would take the others along.
    """
    return a.isolation is b.isolation is Isolation.ATTENTION


def tokens_of(micro: MicroBatch) -> int:
    """The number of tokens in a micro-batch."""
    return micro["input_ids"].shape[1]


def _first_fit(own: Sequence[tuple[RunStep, list[MicroBatch]]], most: int) -> list[list[tuple[RunStep, MicroBatch]]]:
    """Each micro-batch in the first row with room for it, after those before it in its run."""
    joined: list[list[tuple[RunStep, MicroBatch]]] = []
    sizes: list[int] = []
    for s, micro in own:
        place = 0
        for m in micro:
            size = tokens_of(m)
            while place < len(joined) and (sizes[place] + size > most or not _can_share_row(s, joined[place][0][0])):
                place += 1
            if place == len(joined):
                joined.append([])
                sizes.append(0)
            joined[place].append((s, m))
            sizes[place] += size
            place += 1
    return joined
