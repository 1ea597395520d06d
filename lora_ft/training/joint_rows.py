"""What several runs wait for, and the rows in which it is computed together."""

import math
import random
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from lora_ft.data.batches import MicroBatch, Shard
from lora_ft.model.device import micro_batch_tokens, random_states, set_random_states
from lora_ft.nn.attention import Isolation

ENOUGH = {"cpu": 305}  # tokens of a row in a step; longer ones take too much memory (docs/training.md)
ORDERS = 20  # how many orders of the runs are tried; with eight runs hardly any other needs fewer rows


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
class RunRows:
    """Rows whose log-probabilities a run waits for."""

    run: int
    isolation: Isolation
    micro: Sequence[MicroBatch]


@dataclass
class RunStep(RunRows):
    """A step whose gradients a run waits for. total: see `Step`. generators: as the run left them."""

    model: PreTrainedModel
    total: int
    shard: Shard
    generators: RunGenerators = field(default_factory=RunGenerators)


R = TypeVar("R", bound=RunRows)


def row_limit(setting: int | str, device: str) -> int:
    """The most tokens of several runs in a row of a step, unless a run has a longer one alone."""
    return min(micro_batch_tokens(setting, device), ENOUGH.get(device, sys.maxsize))


def rows(waiting: Sequence[R], most: int) -> list[list[tuple[R, MicroBatch]]]:
    """The runs' micro-batches in few rows: in each at most one of a run, and a run's in their order.

    A row has at most `most` tokens, or as many as the longest that a run has alone. Among as few, the longest has few tokens.
    """
    own = [(run, [m for m in run.micro if len(m["keep"])]) for run in waiting]
    sizes = [tokens_of(m) for _, micro in own for m in micro]
    high = max(most, *sizes, 0)
    joined = _few_rows(own, high)
    low = max(*sizes, math.ceil(sum(sizes) / max(1, len(joined))), 0)
    while low < high:
        middle = (low + high) // 2
        even = _few_rows(own, middle)
        if len(even) <= len(joined):
            joined, high = even, middle
        else:
            low = middle + 1
    return joined


def _shares(run: RunRows) -> bool:
    """Whether a run can have a row in common with others.

    Not with MASK: it gives the tokens of other runs the weight 0, and 0 times NaN is NaN, so one run that diverges would spoil
    the others.
    """
    return run.isolation is Isolation.ATTENTION


def tokens_of(micro: MicroBatch) -> int:
    """The number of tokens in a micro-batch."""
    return micro["input_ids"].shape[1]


def _few_rows(own: Sequence[tuple[R, list[MicroBatch]]], most: int) -> list[list[tuple[R, MicroBatch]]]:
    """The fewest rows that the runs fill one after the other, in one of some orders."""
    shared = sum(tokens_of(m) for run, micro in own if _shares(run) for m in micro)
    least = math.ceil(shared / max(1, most)) + sum(len(micro) for run, micro in own if not _shares(run))
    least = max(least, *(len(micro) for _, micro in own), 0)
    fewest, order, draw = _first_fit(own, most), [*own], random.Random(0)
    for _ in range(ORDERS):
        if len(fewest) <= least:
            break
        draw.shuffle(order)
        fewest = min(fewest, _first_fit(order, most), key=len)
    return fewest


def _first_fit(own: Sequence[tuple[R, list[MicroBatch]]], most: int) -> list[list[tuple[R, MicroBatch]]]:
    """Each micro-batch in the first row with room for it, after those before it in its run."""
    joined: list[list[tuple[R, MicroBatch]]] = []
    sizes: list[int] = []
    for run, micro in own:
        place = 0
        for m in micro:
            size = tokens_of(m)
            if not _shares(run):
                place = len(joined)
            while place < len(joined) and (sizes[place] + size > most or not _shares(joined[place][0][0])):
                place += 1
            if place == len(joined):
                joined.append([])
                sizes.append(0)
            joined[place].append((run, m))
            sizes[place] += size
            place += 1
    return joined
