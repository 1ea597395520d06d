"""Flat rows: several sequences of tokens one after another, without padding; a beginning that some share is there once.

Sequences with a common beginning make a tree: the tokens that all share, then what differs, in which again some may share
more. Its nodes are the row's *segments*. A token's position is its position in its sequence, and it attends to the tokens
before it in its own segment and to those of the segments that this one continues (nn/attention.py). So every sequence
computes what it computes alone, and the gradient of a shared token is the sum over its sequences.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WORTHWHILE = 16  # tokens that a shared segment must save, since it costs one more call of attention per layer

Ids = Sequence[int]


class Segment(NamedTuple):
    """`length` tokens of a row that continue those of the earlier segment `parent`, or begin a sequence if that is None."""

    length: int
    parent: int | None = None


class FlatRow(NamedTuple):
    """Sequences as one row.

    input_ids, position_ids: (1, tokens). segments: of these tokens, in order. places: of each sequence (its length,), where
    in the row its tokens are.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: list[Segment]
    places: list[Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is given."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}


class Tree(NamedTuple):
    """The segments of some sequences; `spans[n]` is (sequence, start, end): segment n holds those tokens of that sequence.

    last: of each sequence, the segment with its last token.
    """

    spans: list[tuple[int, int, int]]
    parents: list[int | None]
    last: list[int]

    @classmethod
    def of(cls, sequences: Sequence[Ids], share: bool = True) -> "Tree":
        """Share beginnings where that is worthwhile. A segment's descendants follow it directly.

        Where nothing is shared, the sequences keep their order.
        """
        alone = cls(
            [(i, 0, len(s)) for i, s in enumerate(sequences)], [None] * len(sequences), [*range(len(sequences))]
        )
        if not share or len(sequences) < 2:
            return alone
        tree = cls([], [], [0] * len(sequences))
        groups: list[tuple[list[int], int, int | None]] = [
            (sorted(alone.last, key=lambda i: tuple(sequences[i])), 0, None)
        ]
        while groups:  # sorted sequences that are alike up to `start`, where segment `parent` ends
            group, start, parent = groups.pop()
            end = shared_length(sequences[group[0]], sequences[group[-1]])  # first and last in order: all share as much
            ended = [i for i in group if len(sequences[i]) == end]
            others: list[list[int]] = []
            for i in group[len(ended) :]:
                if others and sequences[i][end] == sequences[others[-1][0]][end]:
                    others[-1].append(i)
                else:
                    others.append([i])
            if len(group) == 1 or (len(group) - 1) * (end - start) >= WORTHWHILE:
                tree.spans.append((group[0], start, end))
                tree.parents.append(parent)
                start, parent = end, len(tree.spans) - 1
                for i in ended:
                    tree.last[i] = parent
            else:
                others = [[i] for i in ended] + others
            groups += [(other, start, parent) for other in reversed(others)]
        return tree if len(tree.spans) != len(alone.spans) or any(p is not None for p in tree.parents) else alone

    def length(self, segment: int) -> int:
        """Its tokens."""
        _, start, end = self.spans[segment]
        return end - start

    def segments(self) -> list[Segment]:
        """The segments in the order of the row."""
        return [Segment(self.length(n), parent) for n, parent in enumerate(self.parents)]

    def groups(self) -> list[list[int]]:
        """The sequences that share a beginning, by the order of their segments."""
        groups: dict[int, list[int]] = {}
        for i in sorted(range(len(self.last)), key=self.last.__getitem__):
            groups.setdefault(self.path(i)[0], []).append(i)
        return [*groups.values()]

    def path(self, sequence: int) -> list[int]:
        """The segments that hold a sequence's tokens, from its first."""
        path = [self.last[sequence]]
        while (parent := self.parents[path[-1]]) is not None:
            path.append(parent)
        return path[::-1]


def shared_length(a: Ids, b: Ids) -> int:
    """How many tokens `a` and `b` begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def flat_row(sequences: Sequence[Ids], share: bool = False, device: torch.device | str = "cpu") -> FlatRow:
    """The row of these sequences; share: whether a beginning that some have in common is there once."""
    tree = Tree.of(sequences, share)
    starts = [*itertools.accumulate((end - start for _, start, end in tree.spans), initial=0)]
    ids = [token for i, start, end in tree.spans for token in sequences[i][start:end]]
    positions = [torch.arange(start, end) for _, start, end in tree.spans]
    places = [torch.cat([torch.arange(starts[n], starts[n + 1]) for n in tree.path(i)]) for i in range(len(sequences))]
    ids_and_positions = torch.tensor([ids], device=device), torch.cat(positions)[None].to(device)
    return FlatRow(*ids_and_positions, tree.segments(), places)
