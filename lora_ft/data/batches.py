"""Which examples make up an optimizer step, and how a step is packed into flat micro-batches (nn/rows.py).

An item of a StepPlan is one optimizer step, or one rank's shard of it: a pure function of the seed and the step's number, so a
run can resume anywhere. How a step is sharded and packed (`micro_batch_tokens`) changes neither its examples nor, except for
rounding, its gradient.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from lora_ft.nn.attention import Isolation, shares
from lora_ft.nn.rows import Ids, Segment, Tree, flat_row

EMPTY_EXAMPLE = {"input_ids": [0], "labels": [-100]}  # nothing supervised


class MicroBatch(TypedDict):
    """One flat row of examples.

    input_ids, position_ids: (1, tokens); positions are those in an example. keep: (supervised,) the positions whose next
    token is supervised, once for each example that shares them. targets: (supervised,) those next tokens. segments: see
    `FlatRow`.
    """

    input_ids: Tensor
    position_ids: Tensor
    keep: Tensor
    targets: Tensor
    segments: list[Segment]


class Step(TypedDict):
    """One optimizer step.

    micro: the micro-batches of this rank. total: supervised tokens, tokens: tokens, rows: locations of the examples, all
    three over all ranks.
    """

    micro: list[MicroBatch]
    total: int
    tokens: int
    rows: list[str]


class Shard(NamedTuple):
    """Which part of each step this rank computes. padded: add empty micro-batches so that all ranks run equally many."""

    rank: int = 0
    world_size: int = 1
    padded: bool = False


UNSHARDED = Shard()


class RowPacking(NamedTuple):
    """How examples share rows: at most `max_tokens` per row (a longer example has a row of its own), or one_per_row.

    share: whether a beginning that some examples have in common is in their row once.
    """

    max_tokens: int
    one_per_row: bool = False
    share: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, isolation: Isolation, max_tokens: int, share: bool = True) -> "RowPacking":
        """Rows as a loaded model can compute them; share: whether beginnings are to be shared where it can."""
        return cls(max_tokens, isolation is Isolation.ONE_PER_ROW, share and shares(model, isolation))

    def rows(self, examples: Sequence[Ids]) -> list[list[int]]:
        """Indices of `examples` (token ids), grouped into as few rows as fit, those that share a beginning together.

        The rows have nearly equal sums where that fits: the largest row determines the memory.
        """
        if self.one_per_row:
            return [[i] for i in range(len(examples))]
        whole = Tree.of(examples, self.share)
        groups = [part for group in whole.groups() for part in self._parts(whole, group)]
        rows = self._even_rows([tokens for _, tokens in groups])
        return [[i for g in row for i in groups[g][0]] for row in rows]

    def _parts(self, tree: Tree, members: list[int]) -> list[tuple[list[int], int]]:
        """A group of examples that share beginnings, in parts that fit a row each; each part's members and tokens."""
        parts: list[tuple[list[int], int]] = []
        there: set[int] = set()
        for i in members:
            path = tree.path(i)
            tokens = sum(tree.length(n) for n in path if n not in there)
            if parts and parts[-1][1] + tokens <= self.max_tokens:
                parts[-1] = ([*parts[-1][0], i], parts[-1][1] + tokens)
            else:
                there = set()
                parts.append(([i], sum(map(tree.length, path))))
            there.update(path)
        return parts

    def _even_rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of `lengths` (tokens) in rows; see `rows`."""
        rows = self._first_fit(lengths)
        even = split_evenly(lengths, len(rows))
        return even if all(sum(lengths[i] for i in row) <= self.max_tokens for row in even) else rows

    def _first_fit(self, lengths: Sequence[int]) -> list[list[int]]:
        """Longest first, each into the first row with room for it."""
        rows: list[list[int]] = []
        room: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = next((r for r, left in enumerate(room) if lengths[i] <= left), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(self.max_tokens)
            rows[row].append(i)
            room[row] -= lengths[i]
        return rows


def split_evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of `lengths` in `count` groups of nearly equal sums: longest first, each to the smallest group so far.

    Longest processing time first (Graham 1969): the largest sum is within 4/3 of the optimum, and far closer for many
    examples.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        smallest = sums.index(min(sums))
        groups[smallest].append(i)
        sums[smallest] += lengths[i]
    return [sorted(group) for group in groups]


def micro_batch(examples: Sequence[dict], share: bool = False) -> MicroBatch:
    """The flat row of examples with `input_ids` and `labels` (labels[i] is input_ids[i], or -100 if not supervised)."""
    row = flat_row([example["input_ids"] for example in examples], share)
    keep, targets = [], []
    for example, places in zip(examples, row.places, strict=True):
        labels = torch.tensor(example["labels"])
        supervised = (labels[1:] >= 0).nonzero()[:, 0]  # no position predicts a first token
        keep.append(places[supervised])
        targets.append(labels[1:][supervised])
    return MicroBatch(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        keep=torch.cat(keep),
        targets=torch.cat(targets),
        segments=row.segments,
    )


class StepPlan(Dataset):
    """The optimizer steps of a run: each epoch's shuffled examples, batch_size per step; an epoch's last may have fewer.

    dataset: as in `Examples`; its columns input_ids, labels, tokens, supervised and where are read. epochs: ignored if
    max_steps is given.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        batch_size: int,
        epochs: float,
        max_steps: int | None,
        packing: RowPacking,
        seed: int,
        shard: Shard = UNSHARDED,
    ):
        self.dataset, self.batch_size, self.packing, self.seed, self.shard = dataset, batch_size, packing, seed, shard
        self.steps_per_epoch = math.ceil(len(dataset) / batch_size)
        self.steps = max_steps or max(1, math.ceil(epochs * self.steps_per_epoch))
        self._epoch: tuple[int, list[int]] = (-1, [])  # the epoch shuffled last, and its order

    def __len__(self) -> int:
        return self.steps

    def examples(self, step: int) -> list[int]:
        """The indices of the examples of a step, from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = (epoch, torch.randperm(len(self.dataset), generator=generator).tolist())
        return self._epoch[1][position * self.batch_size : (position + 1) * self.batch_size]

    def epoch_at(self, step: int) -> float:
        """The number of epochs completed after `step` steps."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch + min(1.0, position * self.batch_size / len(self.dataset))

    def __getitem__(self, step: int) -> Step:
        """The step's micro-batches for this rank, and its totals over all ranks."""
        examples = [self.dataset[i] for i in self.examples(step)]
        lengths = [len(e["input_ids"]) for e in examples]
        rows_by_rank = [
            [[group[i] for i in row] for row in self.packing.rows([examples[i]["input_ids"] for i in group])]
            for group in split_evenly(lengths, self.shard.world_size)
        ]
        own = rows_by_rank[self.shard.rank]
        micro = [micro_batch([examples[i] for i in row], self.packing.share) for row in own]
        if self.shard.padded:
            micro += [micro_batch([EMPTY_EXAMPLE])] * (max(map(len, rows_by_rank)) - len(micro))
        return Step(
            micro=micro,
            total=sum(e["supervised"] for e in examples),
            tokens=sum(e["tokens"] for e in examples),  # unlike `lengths`, without prompt tuning's virtual tokens
            rows=[e["where"] for e in examples],
        )
