"""How the tokens of a flat row (nn/rows.py) attend to each other: in blocks with masks, or as offsets for one call."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ft.nn.rows import Segment

BLOCK = 128  # tokens of segments that continue others and are computed in one block, if they are short


class Offsets(NamedTuple):
    """What variable-length attention is told.

    queries, keys: (segments + 1,) int32, where each segment's begin, and the end of the last. longest_query, longest_key:
    the most of a segment. gather: (all keys,), where in the row the keys are, or None if it holds them in order.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    gather: Tensor | None


class Layout:
    """The attention of a row of segments.

    A segment that begins a sequence is a block of its own, in which attention is plainly causal. Short ones that continue
    others share a block, so that what they continue is read once for all of them.

    Attributes:
        tokens: of the row. shared: whether a segment continues another. ends: of each segment, the tokens of its sequence up
        to its end. lengths: the tokens of each block, in order. reads: of each block, the blocks that hold its keys, itself
        last.
    """

    def __init__(self, segments: Sequence[Segment]):
        self.segments = segments
        self.tokens = sum(s.length for s in segments)
        self.shared = any(s.parent is not None for s in segments)
        self.lengths: list[int] = []
        self.reads: list[list[int]] = []
        self._masks: dict[tuple, Tensor] = {}
        self._offsets: Offsets | None = None
        self.ends: list[int] = []
        blocks: list[int] = []  # of each segment
        for length, parent in segments:
            self.ends.append(length if parent is None else self.ends[parent] + length)
            joins = parent is not None and len(self.reads[-1]) > 1 and self.lengths[-1] + length <= BLOCK
            if not joins:
                self.lengths.append(0)
                self.reads.append([len(self.reads)])
            self.lengths[-1] += length
            blocks.append(len(self.lengths) - 1)
            if parent is not None:
                self.reads[-1] = sorted({*self.reads[-1], *self.reads[blocks[parent]]})

    def mask(self, block: int, window: int | None, device: torch.device) -> Tensor | None:
        """(queries, keys) of a block, True where a query attends to a key; None if that is plainly causal.

        window: query i attends to key j where 0 <= i - j < window, i and j being positions in their sequence.
        """
        alone, length = self.reads[block] == [block], self.lengths[block]
        if alone and (window is None or window >= length):
            return None
        key = (length if alone else (block,), window, device)
        if key not in self._masks:  # for all layers of the model
            starts = [0, *itertools.accumulate(self.lengths)]
            places = [torch.arange(starts[b], starts[b + 1]) for b in self.reads[block]]
            q, k = places[-1][:, None], torch.cat(places)
            mask = self.continues[self.segment_of[q], self.segment_of[k]] & (k <= q)
            if window is not None:
                mask &= self.positions[q] - self.positions[k] < window
            self._masks[key] = _moved(mask, device)
        return self._masks[key]

    @functools.cached_property
    def continues(self) -> Tensor:
        """(segments, segments): whether the first is the second, or continues it, directly or not."""
        related = torch.eye(len(self.segments), dtype=torch.bool)
        for i, (_, parent) in enumerate(self.segments):
            if parent is not None:
                related[i] |= related[parent]
        return related

    @functools.cached_property
    def segment_of(self) -> Tensor:
        """(tokens,) the segment of each token."""
        return torch.tensor([i for i, s in enumerate(self.segments) for _ in range(s.length)])

    @functools.cached_property
    def positions(self) -> Tensor:
        """(tokens,) the position of each token in its sequence."""
        return torch.cat([torch.arange(e - s.length, e) for e, s in zip(self.ends, self.segments, strict=True)])

    def offsets(self, device: torch.device) -> Offsets:
        """The segments for variable-length attention: the queries of one are the last of its keys."""
        if self._offsets is None or self._offsets.queries.device != device:  # once for all layers of the model
            self._offsets = self._offsets_on(device)
        return self._offsets

    def _offsets_on(self, device: torch.device) -> Offsets:
        own: list[int] = [s.length for s in self.segments]
        paths: list[list[int]] = []
        starts = [0, *itertools.accumulate(own)]
        for i, (_, parent) in enumerate(self.segments):
            paths.append([*(paths[parent] if parent is not None else []), i])
        queries, keys = (torch.tensor([0, *itertools.accumulate(n)]).int() for n in (own, self.ends))
        gather = torch.cat([torch.arange(starts[n], starts[n + 1]) for path in paths for n in path])
        offsets = _moved(queries, device), _moved(keys, device), max(own), max(self.ends)
        return Offsets(*offsets, _moved(gather, device) if self.shared else None)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy to a GPU that nothing waits for."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
