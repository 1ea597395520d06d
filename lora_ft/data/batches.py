"""Which examples make a step, and how a step is cut into flat micro-batches.

One item of the plan is one whole optimizer step, or a process's share of it. It is a pure function of the seed and the step's
number, so a run can go on anywhere; and how it is shared out and cut (`micro_batch_tokens`) changes neither its examples nor,
beyond rounding, its gradient.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_ft.nn.attention import flat_row

EMPTY_EXAMPLE = {"input_ids": [0], "labels": [-100]}  # an example with nothing to learn from


class MicroBatch(TypedDict):
    """A flat row.

    input_ids, position_ids: (1, tokens). keep: (supervised,) positions whose next token is supervised. targets: (supervised,)
    those next tokens. lengths: of the examples in the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    keep: Tensor
    targets: Tensor
    lengths: list[int]


class Step(TypedDict):
    """micro: this process's micro-batches. Of the whole step: total, its supervised tokens; tokens; rows, where they stand."""

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
    """How examples share rows: at most `max_tokens` in one (a longer example gets a row of its own), or one_per_row."""

    max_tokens: int
    one_per_row: bool = False

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of `lengths`, grouped into as few rows as fit, of equal sums where that fits: memory is the largest row's."""
        if self.one_per_row:
            return [[i] for i in range(len(lengths))]
        rows = self._first_fit(lengths)
        even = split_evenly(lengths, len(rows))
        fits = max(sum(lengths[i] for i in row) for row in even) <= self.max_tokens if even else True
        return even if fits else rows

    def _first_fit(self, lengths: Sequence[int]) -> list[list[int]]:
        """Longest first, each into the first row with room."""
        rows: list[list[int]] = []
        room: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = next((r for r, left in enumerate(room) if lengths[i] <= left), None)
            if row is None:
                rows.append([])
                room.append(self.max_tokens)
                row = len(rows) - 1
            rows[row].append(i)
            room[row] -= lengths[i]
        return rows


def split_evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of `lengths` in `count` shares of nearly equal sums: longest first, each to the smallest share so far.

    (Longest processing time first, Graham 1969: within 4/3 of the best deal, and far closer for many examples.)
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        smallest = sums.index(min(sums))
        shares[smallest].append(i)
        sums[smallest] += lengths[i]
    return [sorted(share) for share in shares]


def micro_batch(examples: Sequence[dict]) -> MicroBatch:
    """The flat row of examples with `input_ids` and `labels` (-100: not supervised; labels[i] is input_ids[i] or that)."""
    keep, targets, start = [], [], 0
    for example in examples:
        labels = example["labels"]
        supervised = [i for i in range(1, len(labels)) if labels[i] >= 0]  # nothing stands before a first token
        keep += [start + i - 1 for i in supervised]
        targets += [labels[i] for i in supervised]
        start += len(labels)
    row = flat_row([example["input_ids"] for example in examples])
    return MicroBatch(
        input_ids=row["input_ids"],
        position_ids=row["position_ids"],
        keep=torch.tensor(keep, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        lengths=[len(example["input_ids"]) for example in examples],
    )


def on_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch's tensors on `device`, without waiting for the copies where the memory is pinned."""
    to = {key: x.to(device, non_blocking=True) for key, x in micro.items() if isinstance(x, Tensor)}
    return micro | to  # type: ignore[return-value]


class StepPlan(Dataset):
    """The optimizer steps of a run, each an epoch's shuffled examples in turn; an epoch's last step may be smaller."""

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
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def examples(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = (epoch, torch.randperm(len(self.dataset), generator=generator).tolist())
        return self._epoch[1][position * self.batch_size : (position + 1) * self.batch_size]

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch + min(1.0, position * self.batch_size / len(self.dataset))

    def __getitem__(self, step: int) -> Step:
        examples = [self.dataset[i] for i in self.examples(step)]
        lengths = [len(e["input_ids"]) for e in examples]
        shares = [
            [[share[i] for i in row] for row in self.packing.rows([lengths[i] for i in share])]
            for share in split_evenly(lengths, self.shard.world_size)
        ]
        micro = [micro_batch([examples[i] for i in row]) for row in shares[self.shard.rank]]
        if self.shard.padded:
            micro += [micro_batch([EMPTY_EXAMPLE])] * (max(map(len, shares)) - len(micro))
        total = sum(sum(label >= 0 for label in e["labels"][1:]) for e in examples)
        tokens = sum(e["tokens"] for e in examples)  # prompt tuning's virtual tokens are no tokens of the data
        return Step(micro=micro, total=total, tokens=tokens, rows=[e["where"] for e in examples])
