"""From a chat's text to token ids and labels, and what a chat that is too long loses."""

import os
from collections.abc import Iterator

import numpy as np

from lora_ft.data.cuts import TurnSpan, shorten_chat
from lora_ft.data.pieces import Ids, as_ids
from lora_ft.data.tokens import IGNORE, Encoded, TextEncoder

MAX_TRIES = 5  # of shortening a chat, whose tokens are other ones once it is shorter
AT_ONCE = 2**20  # tokens whose spans are looked up together
LEAST = 64  # tokens of a turn (or half of max_length): before they are fewer, a chat loses earlier turns


def encode_chats(
    texts: list[str],
    spans: list[list[int]],
    turns: list[list[int]],
    max_length: int,
    truncate: str,
    encoder: TextEncoder,
) -> Iterator[Encoded]:
    """Chats as the template renders them, with its special tokens; the tokens of each span are supervised.

    A span starts where a model continues its prompt. Where a token would reach across its start or end, the text is
    tokenized in parts, as at inference. A chat that is too long is cut as data.truncate says.

    spans: for each chat start, end, start, end, ... in characters. turns: as `TurnSpan`, flat.
    """
    for text, row, others, (ids, offsets) in zip(texts, spans, turns, encoder.encode_with_offsets(texts), strict=True):
        ids, labels = _label_chat(text, row, ids, offsets, encoder)
        full_length, blank = len(ids), bool((labels == IGNORE).all())
        if full_length > max_length and truncate == "column":
            ids, labels, _ = _shorten(text, row, others, max_length, encoder)
        kept = slice(-max_length, None) if truncate == "start" else slice(max_length)
        ids, labels = ids[kept], labels[kept]
        labels[:1] = IGNORE
        yield Encoded(as_ids(ids), as_ids(labels), full_length, truncated=full_length > max_length, blank=blank)


def cut_chat_prompt(text: str, chat: str, turns: list[int], max_length: int, encoder: TextEncoder) -> Ids:
    """At most `max_length` ids of a generation prompt, the start of `chat`, which loses what chats lose in training.

    turns: of the chat, as `TurnSpan`, flat.
    """
    ids = encoder.encode_bare(text)
    if len(ids) > max_length:
        shared = len(os.path.commonprefix([text, chat]))
        inside = [n for i in range(0, len(turns), 3) if turns[i + 1] <= shared for n in turns[i : i + 3]]
        ids = as_ids(_shorten(text, [], inside, max_length, encoder)[0])
    return encoder.truncate_start(ids, max_length)


def lost_of_chat(
    text: str, spans: list[int], turns: list[int], max_length: int, truncate: str, encoder: TextEncoder
) -> list[tuple[int, int]]:
    """What a chat that is too long loses, in characters (start, end); in its place is CUT_MARK where `truncate` is column."""
    if truncate == "column":
        return _shorten(text, spans, turns, max_length, encoder)[2]
    _, offsets = next(encoder.encode_with_offsets([text]))
    return [(0, offsets[-max_length, 0])] if truncate == "start" else [(offsets[max_length - 1, 1], len(text))]


def _shorten(
    text: str, spans: list[int], turns: list[int], max_length: int, encoder: TextEncoder
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """The ids and labels of a chat without what it loses to be of `max_length` tokens, if it can, and what that is."""
    flat = zip(turns[::3], turns[1::3], turns[2::3], strict=True)
    parts = [TurnSpan(start, end, role) for start, end, role in flat]
    room, before, least = max_length, None, min(LEAST, max_length // 2)
    for _ in range(MAX_TRIES):
        shorter, kept, lost = shorten_chat(
            text, spans, parts, lambda t: next(encoder.encode_with_offsets([t]))[1], room, least
        )
        ids, labels = _label_chat(shorter, kept, *next(encoder.encode_with_offsets([shorter])), encoder)
        if len(ids) <= max_length or shorter == before:
            break
        before = shorter
        room -= len(ids) - max_length
    return ids, labels, lost


def _label_chat(
    text: str, spans: list[int], ids: np.ndarray, offsets: np.ndarray, encoder: TextEncoder
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a chat; ids, offsets: of its text as one piece."""
    edges = np.array(spans, dtype=offsets.dtype)
    before = np.searchsorted(offsets[:, 0], edges) - 1  # the last token that starts before an edge
    cuts = edges[(before >= 0) & (offsets[before, 1] > edges)].tolist() if len(ids) else []
    if cuts:
        starts = [0, *cuts]
        parts = [text[start:end] for start, end in zip(starts, [*cuts, len(text)], strict=True)]
        encoded = list(zip(starts, encoder.encode_with_offsets(parts), strict=True))
        ids = np.concatenate([part for _, (part, _) in encoded])
        offsets = np.concatenate([start + part for start, (_, part) in encoded])
    bounds, labels = np.array([*spans, 2**62, 2**62]).reshape(-1, 2), ids.astype(np.int32)
    for start in range(0, len(ids), AT_ONCE):
        part = offsets[start : start + AT_ONCE]
        # for each token, the first span that ends after the token's start
        span = bounds[np.searchsorted(bounds[:, 1], part[:, 0], side="right")]
        labels[start : start + AT_ONCE][span[:, 0] >= part[:, 1]] = IGNORE
    labels[:1] = IGNORE
    return ids, labels
