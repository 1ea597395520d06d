"""From texts to ids and labels: the boundary between prompt and completion, special tokens, truncation.

A label is the id at its own place (not shifted), or IGNORE. The first token of an example is never supervised, for
nothing comes before it that could predict it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

IGNORE = -100
Ids = list[int]


class Encoded(NamedTuple):
    """One example: lists of ids as long as each other, and what Examples.dataset says of it."""

    input_ids: Ids
    labels: Ids
    whole: int  # tokens before truncation
    prompt_length: int = 0
    choices: list[Ids] = []  # noqa: RUF012
    truncated: bool = False
    merged: bool = False
    blank: bool = False  # nothing supervised, even before truncation

    @property
    def supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)


@dataclass(frozen=True)
class Coder:
    """A fast tokenizer's own backend, and what its post-processing adds to a text: `before` (BOS, where it has one),
    `after`.

    whole: the backend, without padding or truncation. plain: the same without post-processing, so that nothing is
    added and character offsets are as they are (ByteLevel's leaves white space out of them). eos: the id of the end
    of a sequence, in a list; empty where it has none.
    """

    whole: Tokenizer
    plain: Tokenizer
    before: Ids
    after: Ids
    eos: Ids

    def with_specials(self, texts: list[str]) -> list[Ids]:
        """Ids as at inference, but for what the tokenizer adds after a text: generation goes on from there."""
        rows = (encoding.ids for encoding in self.whole.encode_batch_fast(texts))
        return [ids[: len(ids) - len(self.after)] for ids in rows]

    def alone(self, text: str) -> Ids:
        """Ids of the text by itself, nothing added."""
        return self.plain.encode(text).ids

    def cut_start(self, prompt: Ids, room: int) -> Ids:
        """The prompt's end, as much as there is room for; what the tokenizer adds before a text (BOS) is kept."""
        if len(prompt) <= room:
            return prompt
        first, tail = len(self.before), max(room - len(self.before), 0)
        return prompt[:first] + (prompt[first:][-tail:] if tail else [])

    def without_eos(self, ids: Ids) -> Ids:
        """A template may spell the end-of-sequence token out; it must not come twice."""
        return ids[:-1] if self.eos and ids[-1:] == self.eos else ids


def coder(tokenizer: PreTrainedTokenizerBase) -> Coder:
    """Copies of the tokenizer's backend, and what it adds, learned from a short text."""
    whole = copy.deepcopy(tokenizer.backend_tokenizer)
    whole.no_truncation()
    whole.no_padding()
    whole.encode_special_tokens = tokenizer.split_special_tokens
    plain = copy.deepcopy(whole)
    plain.encode_special_tokens = tokenizer.split_special_tokens  # a copy doesn't keep it
    plain.post_processor = processors.Sequence([])
    inner, outer = plain.encode("a").ids, whole.encode("a").ids
    first = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), 0)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return Coder(whole, plain, outer[:first], outer[first + len(inner) :], end)


def encode_pairs(
    prompts: list[str], completions: list[str], choices: list[list[str]], max_length: int, coder: Coder
) -> Iterator[Encoded]:
    """Prompts and completions; `choices[i]` are completions to be compared, or empty.

    A completion is what prompt + completion, tokenized together, adds. Where tokens merge across the boundary it is
    tokenized alone. Too long: the prompt loses its start (BOS kept) until the completion fits, with the longest
    choice and end-of-sequence; then the completion its end.
    """
    # The completion is one of the choices, where there are any.
    answers = [words or [completion] for completion, words in zip(completions, choices, strict=True)]
    for i, (prompt, encoded, merges) in enumerate(_added(prompts, answers, coder)):
        right = answers[i].index(completions[i])
        completion, words = encoded[right], encoded if choices[i] else []
        whole = completion + coder.eos
        room = max_length - max(len(whole), *(len(w) + len(coder.eos) for w in words), 0)
        kept = coder.cut_start(prompt, room)
        ids = (kept + whole)[:max_length]
        labels = [IGNORE] * len(kept) + whole
        labels = [IGNORE, *labels[1:]][: len(ids)]
        yield Encoded(
            ids,
            labels,
            whole=len(prompt) + len(whole),
            prompt_length=min(len(kept), max_length),
            choices=words,
            truncated=len(ids) < len(prompt) + len(whole),
            merged=merges[right],
            blank=len(prompt) + len(whole) < 2 or not whole,
        )


def _added(prompts: list[str], answers: list[list[str]], coder: Coder) -> Iterator[tuple[Ids, list[Ids], list[bool]]]:
    """(the prompt's ids, each answer's ids after it, whether each answer's tokens merge with the prompt's)."""
    joint = iter(coder.with_specials([p + a for p, texts in zip(prompts, answers, strict=True) for a in texts]))
    for prompt, texts in zip(coder.with_specials(prompts), answers, strict=True):
        found, merges = [], []
        for text in texts:
            ids = next(joint)
            merges.append(ids[: len(prompt)] != prompt)
            found.append(coder.without_eos(coder.alone(text) if merges[-1] else ids[len(prompt) :]))
        yield prompt, found, merges


def encode_texts(texts: list[str], max_length: int, split: bool, coder: Coder) -> Iterator[list[Encoded]]:
    """Texts, supervised but for BOS, with end-of-sequence after the true end; a list of pieces for each.

    split: a text longer than max_length becomes pieces of it, each with a BOS of its own where there is one.
    """
    for ids in coder.with_specials(texts):
        body = coder.without_eos(ids[len(coder.before) :]) + coder.eos
        size = max(max_length - len(coder.before), 0)
        cut = len(body) > size
        starts = range(0, len(body), size) if split and size else [0]
        pieces = []
        for start in starts:
            piece = body[start : start + size]
            labels = [IGNORE] * len(coder.before) + piece
            pieces.append(
                Encoded(
                    coder.before + piece,
                    [IGNORE, *labels[1:]],
                    whole=len(coder.before) + len(piece if split and size else body),
                    truncated=cut and not (split and size),
                    blank=len(coder.before) + len(body) < 2,
                )
            )
        yield pieces


def encode_chats(texts: list[str], spans: list[list[int]], max_length: int, coder: Coder) -> Iterator[Encoded]:
    """Chats as their template wrote them, special tokens included; supervised where a token has a character of a span.

    spans: start, end, start, end, ... in characters.
    """
    encodings = coder.plain.encode_batch(texts)
    for encoding, row in zip(encodings, spans, strict=True):
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # (tokens, [start, end])
        bounds = np.array([*row, 2**62, 2**62]).reshape(-1, 2)
        # of each token: the first span that ends after the token's start
        span = bounds[np.searchsorted(bounds[:, 1], offsets[:, 0], side="right")]
        labels = np.where(span[:, 0] < offsets[:, 1], ids, IGNORE)
        labels[:1] = IGNORE
        yield Encoded(
            ids[:max_length].tolist(),
            labels[:max_length].tolist(),
            whole=len(ids),
            truncated=len(ids) > max_length,
            blank=bool((labels == IGNORE).all()),
        )
