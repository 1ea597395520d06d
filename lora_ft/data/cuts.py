"""What an example that is too long loses: the middle of its longest parts, and of a chat whole earlier turns."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

CUT_MARK = " [...] "  # for what is left out
OTHER, USER, SYSTEM = range(3)

# What rows that are too long lose, by data.truncate
LOST = {
    "column": "prompts lose the middle of their longest column, marked [...]",
    "start": "prompts are cut at the start",
    "end": "prompts are cut at the end",
}
LOST_OF_CHATS = {
    "column": "chats lose the middle of their longest turns that are not supervised, then their earlier turns, marked [...]",
    "start": "chats are cut at the start",
    "end": "chats are cut at the end",
}


class TurnSpan(NamedTuple):
    """The words of a turn that is not supervised, in characters of the chat's text. role: OTHER, USER or SYSTEM."""

    start: int
    end: int
    role: int


def longest_kept(lengths: Sequence[int] | np.ndarray, room: int) -> int:
    """The most tokens that each part may keep, the longer ones being cut to that, so that all fit into `room`; -1: none."""
    lengths = np.asarray(lengths, dtype=np.int64)
    longest = int(lengths.max(initial=0))
    return bisect_right(range(longest + 1), room, key=lambda n: int(np.minimum(n, lengths).sum())) - 1


def shorten_chat(
    text: str,
    spans: Sequence[int],
    turns: Sequence[TurnSpan],
    offsets: Callable[[str], np.ndarray],
    max_length: int,
    least: int,
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """A chat's text of about `max_length` tokens, its supervised spans (start, end, ... in characters) in it, and what it lost.

    Its longest turns that are not supervised lose their middle. If that would leave less than `least` tokens of them, the
    turns from the first to before a later one of the user are left out too, as few as need be: the system prompt stays, and
    so do the last turns. CUT_MARK stands for what is left out. A supervised turn stays whole or goes whole: if the last
    ones are too long by themselves, the text is longer than `max_length`.

    offsets: the characters (tokens, 2) of a text's tokens.
    """
    mark, (starts, ends) = len(offsets(CUT_MARK)), np.ascontiguousarray(offsets(text).T)
    spots = np.array([turn[:2] for turn in turns], dtype=starts.dtype).reshape(-1, 2)  # in characters
    roles = np.array([turn.role for turn in turns], dtype=int)

    def tokens(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = np.searchsorted(starts, places[..., 0])
        return first, np.maximum(np.searchsorted(ends, places[..., 1], side="right"), first)

    parts = np.stack(tokens(spots), axis=-1)
    lengths = parts[:, 1] - parts[:, 0]
    asks = spots[roles == USER, 0]
    last = spans[-2] if spans else len(text)  # what asks for the last supervised turn is never left out
    ways = [(0, 0), *((int(asks[0]), int(ask)) for ask in asks if asks[0] < ask < last)]  # what is left out

    def way(n: int) -> tuple[tuple[int, int], np.ndarray, int]:
        """What is left out of the characters, which turns are kept, and the tokens that are in none of them."""
        gone = ways[n]
        if len(inside := spots[(roles == SYSTEM) & (gone[0] < spots[:, 0]) & (spots[:, 0] < gone[1]), 0]):
            gone = (gone[0], int(inside[0]))  # a template may write the system prompt into the last turn of the user
        kept = (spots[:, 0] < gone[0]) | (spots[:, 0] >= gone[1])
        first, end = tokens(np.array(gone, dtype=spots.dtype))
        lost = int(end - first) - mark if gone[1] else 0
        return gone, kept, len(starts) - lost - int(lengths[kept].sum())

    def fits(n: int) -> bool:
        _, kept, others = way(n)
        return others + int(np.minimum(lengths[kept], least).sum()) <= max_length

    # the more is left out, the fewer tokens there are
    n = 0 if fits(0) else min(bisect_left(range(1, len(ways)), True, key=fits) + 1, len(ways) - 1)
    gone, kept, others = way(n)
    limit = longest_kept(lengths[kept], max_length - others)
    limit = max(limit, least // 4, mark + 2)
    removed = [gone] if gone[1] else []
    for start, end in parts[kept & (lengths > limit)]:  # the characters between the tokens of its head and of its tail
        head, tail = start + (limit - mark + 1) // 2, end - (limit - mark) // 2
        removed.append((int(ends[head - 1]), int(starts[tail])))
    removed.sort()
    return *_without(text, spans, removed), removed


def _without(text: str, spans: Sequence[int], removed: list[tuple[int, int]]) -> tuple[str, list[int]]:
    """The text with CUT_MARK for what is removed, and the spans that are left."""
    pieces, position = [], 0
    for start, end in removed:
        pieces += [text[position:start], CUT_MARK]
        position = end
    kept, shifts = [], [0, *accumulate(end - start - len(CUT_MARK) for start, end in removed)]
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        before = bisect_right(removed, start, key=lambda part: part[0])  # parts that are removed before it or with it
        if not before or removed[before - 1][1] <= start:
            kept += [start - shifts[before], end - shifts[before]]
    return "".join([*pieces, text[position:]]), kept
