"""Long texts, tokenized in pieces: the same tokens as in one piece, in little memory, and stopped by a signal in between.

A tokenizer decides by the near context, so two pieces that overlap agree on the tokens in the middle of the overlap; there they
are joined. Where they don't agree, the piece grows until it does, at worst to the complete text.
"""

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tokenizers import Encoding, Tokenizer

PIECE, OVERLAP = 2**18, 2**12  # characters
GROUP = 2**16  # characters of short texts that are tokenized at once; at most PIECE
Ids = array  # of int32: a list has 8 bytes for each token, and 28 for its int


def as_ids(ids: Iterable[int] | np.ndarray) -> Ids:
    """Token ids as an array."""
    return array("i", ids.astype(np.int32).tobytes() if isinstance(ids, np.ndarray) else ids)


def encode_long(tokenizer: Tokenizer, text: str) -> Ids:
    """Ids of a text of any length, as of `tokenizer.encode(text)`."""
    result = as_ids(())
    for ids, _ in _parts(tokenizer, text):
        result.frombytes(ids.tobytes())
    return result


def encode_long_with_offsets(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids (tokens,) and character offsets (tokens, 2) of a text of any length, as of `tokenizer.encode(text)`."""
    ids, offsets = as_ids(()), array("i" if len(text) < 2**31 else "q")
    for part, places in _parts(tokenizer, text):
        ids.frombytes(part.tobytes())
        offsets.frombytes(places.tobytes())
    return np.asarray(ids), np.asarray(offsets).reshape(-1, 2)


def encoded_groups(
    encode: Callable[[list[str]], list[Encoding]], texts: Iterable[str]
) -> Iterator[list[Encoding] | str]:
    """The texts in order: a text longer than PIECE as it is, the others by groups, as encoded.

    A group is encoded beside the main thread, which works on the one before meanwhile.
    """
    with ThreadPoolExecutor(1) as pool:
        before: Future[list[Encoding]] | str | None = None
        for group in _groups(texts):
            started = group[0] if len(group[0]) > PIECE else pool.submit(encode, group)
            if before is not None:
                yield before if isinstance(before, str) else before.result()
            before = started
        if before is not None:
            yield before if isinstance(before, str) else before.result()


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of at most GROUP characters or one text."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > GROUP:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _parts(tokenizer: Tokenizer, text: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    start, end, skip = 0, PIECE, 0  # skip: tokens of this piece that the one before has given
    ids, offsets = _encode(tokenizer, text, start, end)
    while end < len(text):
        # from the start of a token, which in a repeated pattern is where the same tokens follow
        at = int(np.searchsorted(offsets[:, 0], end - OVERLAP, side="right")) - 1
        after = int(offsets[at, 0]) if at >= 0 and offsets[at, 0] > start else end - OVERLAP
        next_ids, next_offsets = _encode(tokenizer, text, after, after + PIECE)
        if seam := _seam(ids, offsets, next_ids, next_offsets, after):
            yield ids[skip : seam[0]], offsets[skip : seam[0]]
            start, end, skip = after, after + PIECE, seam[1]
            ids, offsets = next_ids, next_offsets
        else:
            end += end - start
            ids, offsets = _encode(tokenizer, text, start, end)
    yield ids[skip:], offsets[skip:]


def _encode(tokenizer: Tokenizer, text: str, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    encoding = _waiting(tokenizer, text[start:end])
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return np.array(encoding.ids, dtype=np.int32), (offsets + start).astype(np.int32 if len(text) < 2**31 else np.int64)


def _waiting(tokenizer: Tokenizer, text: str) -> Encoding:
    """`tokenizer.encode(text)`, computed beside the main thread, which a signal can interrupt while it waits."""
    result: list[Encoding | BaseException] = []

    def work() -> None:
        try:
            result.append(tokenizer.encode(text))
        except BaseException as e:
            result.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


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
