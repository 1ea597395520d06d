"""Long texts, tokenized in pieces: the same tokens as in one piece, in little memory, and stopped by a signal in between.

A tokenizer decides by the near context, so two pieces that overlap agree on the tokens in the middle of the overlap; there they
are joined. Where they don't agree, the piece grows until it does, at worst to the complete text.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

PIECE, OVERLAP = 2**18, 2**12  # characters


def encode_long(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids (tokens,) and character offsets (tokens, 2) of a text of any length, as of `tokenizer.encode(text)`."""
    joined: list[tuple[np.ndarray, np.ndarray]] = []
    start, end, skip = 0, PIECE, 0  # skip: tokens of this piece that the one before has given
    ids, offsets = _encode(tokenizer, text, start, end)
    while end < len(text):
        after = end - OVERLAP
        next_ids, next_offsets = _encode(tokenizer, text, after, after + PIECE)
        if seam := _seam(ids, offsets, next_ids, next_offsets, after):
            joined.append((ids[skip : seam[0]], offsets[skip : seam[0]]))
            start, end, skip = after, after + PIECE, seam[1]
            ids, offsets = next_ids, next_offsets
        else:
            end += end - start
            ids, offsets = _encode(tokenizer, text, start, end)
    joined.append((ids[skip:], offsets[skip:]))
    return np.concatenate([a for a, _ in joined]), np.concatenate([b for _, b in joined])


def groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of at most PIECE characters or one text."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > PIECE:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _encode(tokenizer: Tokenizer, text: str, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    encoding = tokenizer.encode(text[start:end])
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return np.array(encoding.ids, dtype=np.int32), (offsets + start).astype(np.int32 if len(text) < 2**31 else np.int64)


def _seam(
    ids: np.ndarray, offsets: np.ndarray, next_ids: np.ndarray, next_offsets: np.ndarray, after: int
) -> tuple[int, int] | None:
    """Where two pieces join, as a number of tokens of each: amid tokens on which both agree; None if they don't."""
    low, high = after + OVERLAP // 4, after + OVERLAP - OVERLAP // 4
    at, next_at = (np.flatnonzero((o[:, 0] >= low) & (o[:, 1] <= high)) for o in (offsets, next_offsets))
    if not len(at) or len(at) != len(next_at):
        return None
    same = np.array_equal(ids[at], next_ids[next_at]) and np.array_equal(offsets[at], next_offsets[next_at])
    return (int(at[len(at) // 2]), int(next_at[len(at) // 2])) if same else None
