"""What an example that is too long loses: the middle of its longest parts, and of a chat whole earlier turns."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
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


def longest_kept(lengths: Sequence[int], room: int) -> int:
    """The most tokens that each part may keep, the longer ones being cut to that, so that all fit into `room`; -1: none."""
    return bisect_right(range(max(lengths, default=0) + 1), room, key=lambda n: sum(min(n, m) for m in lengths)) - 1


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
    of_tokens, mark = offsets(text), len(offsets(CUT_MARK))
    starts, ends = of_tokens[:, 0].tolist(), of_tokens[:, 1].tolist()

    def tokens(start: int, end: int) -> tuple[int, int]:
        first = bisect_left(starts, start)
        return first, max(bisect_right(ends, end), first)

    first = next((turn.start for turn in turns if turn.role == USER), None)
    last = spans[-2] if spans else len(text)  # what asks for the last supervised turn is never left out
    later = [turn.start for turn in turns if turn.role == USER and first is not None and first < turn.start < last]
    for next_turn in (first, *later):
        gone = (first, next_turn) if first is not None and next_turn is not None and next_turn > first else (0, 0)
        if inside := [t.start for t in turns if t.role == SYSTEM and gone[0] < t.start < gone[1]]:
            gone = (gone[0], inside[0])  # a template may write the system prompt into the last turn of the user
        kept = [turn for turn in turns if not gone[0] <= turn.start < gone[1]]
        parts = [tokens(turn.start, turn.end) for turn in kept]
        lengths = [end - start for start, end in parts]
        lost = np.subtract(*tokens(*gone)[::-1]) - mark if gone[1] else 0
        limit = longest_kept(lengths, max_length - int(len(starts) - lost - sum(lengths)))
        if limit >= min(least, max(lengths, default=0)):
            break
    limit = max(limit, least // 4, mark + 2)
    removed = [gone] if gone[1] else []
    for (start, end), length in zip(parts, lengths, strict=True):
        if length > limit:  # the characters between the tokens of its head and those of its tail
            head, tail = start + (limit - mark + 1) // 2, end - (limit - mark) // 2
            removed.append((ends[head - 1], starts[tail]))
    removed.sort()
    return *_without(text, spans, removed), removed


def _without(text: str, spans: Sequence[int], removed: list[tuple[int, int]]) -> tuple[str, list[int]]:
    """The text with CUT_MARK for what is removed, and the spans that are left."""
    pieces, position = [], 0
    for start, end in removed:
        pieces += [text[position:start], CUT_MARK]
        position = end
    kept = []
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        if not any(a <= start < b for a, b in removed):
            shift = sum(b - a - len(CUT_MARK) for a, b in removed if b <= start)
            kept += [start - shift, end - shift]
    return "".join([*pieces, text[position:]]), kept
