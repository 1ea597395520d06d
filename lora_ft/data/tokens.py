"""From text to token ids and labels: the boundary between prompt and completion, special tokens, truncation.

labels[i] is input_ids[i] (not shifted) or IGNORE. The first token is never supervised: no token before it predicts it.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from lora_ft.data.cuts import CUT_MARK, longest_kept
from lora_ft.data.pieces import PIECE, Ids, as_ids, encode_long, encode_long_with_offsets, encoded_groups
from lora_ft.data.words import ends_word, splits_at_spaces, start_words

IGNORE = -100
_IGNORED = as_ids([IGNORE])


class Encoded(NamedTuple):
    """One example; the fields are columns of `Examples.dataset`."""

    input_ids: Ids
    labels: Ids
    full_length: int
    prompt_length: int = 0
    choices: Sequence[Ids] = ()
    truncated: bool = False
    merged: bool = False
    blank: bool = False  # nothing supervised, even before truncation

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE)


@dataclass(frozen=True)
class TextEncoder:
    """The backend of a fast tokenizer, without padding and truncation, and what its post-processing adds to a text.

    backend: with post-processing. bare: without it: nothing is added, and character offsets include white space, which
    ByteLevel's post-processing strips. before, after: ids added around a text (BOS where the tokenizer adds it). eos: the
    id of the end-of-sequence token, if there is one. splits_at_spaces: see `lora_ft.data.words`.
    """

    backend: Tokenizer
    bare: Tokenizer
    before: Ids
    after: Ids
    eos: Ids
    splits_at_spaces: bool

    def encode_prompts(self, texts: Iterable[str]) -> Iterator[Ids]:
        """Ids as at inference, without those that the tokenizer adds after a text: generation continues from there."""
        for group in encoded_groups(self.backend.encode_batch_fast, texts):
            if isinstance(group, str):
                yield self.before + self.encode_bare(group)
            else:
                for encoding in group:
                    ids = as_ids(encoding.ids)
                    if self.after:
                        del ids[-len(self.after) :]
                    yield ids

    def encode_bare(self, text: str) -> Ids:
        """Ids of the text alone, nothing added."""
        return as_ids(self.bare.encode(text).ids) if len(text) <= PIECE else encode_long(self.bare, text)

    def encode_bare_once(self, texts: Iterable[str]) -> dict[str, Ids]:
        """`encode_bare` of each text that differs, by text."""
        unique, found = list(dict.fromkeys(texts)), []
        for group in encoded_groups(self.bare.encode_batch_fast, unique):
            found += [encode_long(self.bare, group)] if isinstance(group, str) else [as_ids(e.ids) for e in group]
        return dict(zip(unique, found, strict=True))

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids (tokens,) and character offsets (tokens, 2) of each text alone, nothing added."""
        for group in encoded_groups(self.bare.encode_batch, texts):
            if isinstance(group, str):
                yield encode_long_with_offsets(self.bare, group)
            else:
                for encoding in group:
                    yield np.array(encoding.ids), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def truncate_start(self, prompt: Ids, max_length: int) -> Ids:
        """At most `max_length` ids of the prompt: what the tokenizer adds before a text (BOS), then the prompt's end."""
        if len(prompt) <= max_length:
            return prompt
        first, kept = len(self.before), max(max_length - len(self.before), 0)
        return prompt[:first] + prompt[max(first, len(prompt) - kept) :]

    def cut_prompt(self, prompt: Ids, text: str, spans: list[int], max_length: int, truncate: str) -> Ids:
        """At most `max_length` ids of a prompt, cut as data.truncate says.

        text, spans: the prompt as text, and start, end, ... of the columns in it, in characters.
        """
        if len(prompt) <= max_length:
            return prompt
        if truncate == "end":
            return prompt[: max(max_length, 0)]
        cut = self._cut_columns(text, spans, max_length - len(self.before)) if truncate == "column" else None
        return self.truncate_start(prompt, max_length) if cut is None else self.before + cut

    def _cut_columns(self, text: str, spans: list[int], room: int) -> Ids | None:
        """Ids in which the longest columns have CUT_MARK for their middle; None if that can't make room."""
        (encoded, offsets), mark = next(self.encode_with_offsets([text])), self.encode_bare(CUT_MARK)
        ids, (starts, ends) = as_ids(encoded), offsets.T
        edges = np.searchsorted(starts, spans[::2], "left"), np.searchsorted(ends, spans[1::2], "right")
        columns = list(zip(*(edge.tolist() for edge in edges), strict=True))
        lengths = [max(last - first, 0) for first, last in columns]
        fixed = len(ids) - sum(lengths)
        limit = longest_kept(lengths, room - fixed)
        if limit < len(mark) + 2:
            return None
        for (first, last), length in reversed(list(zip(columns, lengths, strict=True))):
            if length > limit:
                head, tail = first + (limit - len(mark) + 1) // 2, last - (limit - len(mark)) // 2
                while head > first and starts[head] < ends[head - 1]:  # a character of several tokens stays whole
                    head -= 1
                while tail < last and starts[tail] < ends[tail - 1]:
                    tail += 1
                ids = ids[:head] + mark + ids[tail:]
        return ids

    def strip_eos(self, ids: Ids) -> Ids:
        """Without a final end-of-sequence token: a text may spell it out, and it must not occur twice."""
        return ids[:-1] if self.eos and ids[-1:] == self.eos else ids


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """An encoder with copies of the tokenizer's backend; what the tokenizer adds is read off a short text."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    bare = copy.deepcopy(backend)
    bare.encode_special_tokens = tokenizer.split_special_tokens  # lost by deepcopy
    bare.post_processor = processors.Sequence([])
    inner, outer = bare.encode("a").ids, backend.encode("a").ids
    first = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), 0)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before, after = outer[:first], outer[first + len(inner) :]
    return TextEncoder(backend, bare, as_ids(before), as_ids(after), as_ids(eos), splits_at_spaces(bare))


def _labels(unsupervised: int, supervised: Ids) -> Ids:
    """Labels of so many unsupervised tokens and the supervised ones after them."""
    return _IGNORED * unsupervised + supervised if unsupervised else _IGNORED[: len(supervised)] + supervised[1:]


def encode_pairs(
    prompts: list[str],
    completions: list[str],
    choices: list[list[str]],
    spans: list[list[int]],
    max_length: int,
    truncate: str,
    encoder: TextEncoder,
) -> Iterator[Encoded]:
    """Prompts and completions; choices[i] are the completions to compare in a classification, or [].

    The ids of a completion are those that prompt + completion, tokenized together, adds to the prompt's. Where tokens merge
    across the boundary, the completion is tokenized alone. If an example is too long, the prompt is cut (BOS is kept) as
    `TextEncoder.cut_prompt` does, until the longest choice with end-of-sequence fits; then the completion loses its end.
    """
    # the completion is one of the choices, if there are any
    candidates = [tuple(words) or (completion,) for completion, words in zip(completions, choices, strict=True)]
    for i, (prompt, encoded, merges) in enumerate(_encode_after(prompts, candidates, encoder)):
        right = candidates[i].index(completions[i])
        words = encoded if choices[i] else ()
        completion = encoded[right] + encoder.eos
        reserved = max(map(len, encoded)) + len(encoder.eos)
        kept = encoder.cut_prompt(prompt, prompts[i], spans[i], max_length - reserved, truncate)[:max_length]
        full_length = len(prompt) + len(completion)
        fits = completion[: max_length - len(kept)]
        ids, labels = kept + fits, _labels(len(kept), fits)
        truncated, blank = len(ids) < full_length, full_length < 2 or not completion
        yield Encoded(ids, labels, full_length, len(kept), words, truncated, merges[right], blank)


def _encode_after(
    prompts: list[str], candidates: list[tuple[str, ...]], encoder: TextEncoder
) -> Iterator[tuple[Ids, list[Ids], list[bool]]]:
    """For each prompt its ids, the ids of each candidate after it, and whether tokens merge across the boundary.

    Where they don't, equal candidates have the same list of ids.
    """
    can_stand_apart = {texts: encoder.splits_at_spaces and start_words(texts) for texts in set(candidates)}
    apart = [can_stand_apart[texts] and ends_word(prompt) for prompt, texts in zip(prompts, candidates, strict=True)]
    rows = list(zip(apart, prompts, candidates, strict=True))
    kinds = {texts for is_apart, _, texts in rows if is_apart}
    alone = encoder.encode_bare_once(text for texts in kinds for text in texts)
    after = {texts: ([encoder.strip_eos(alone[text]) for text in texts], [False] * len(texts)) for texts in kinds}
    joint = encoder.encode_prompts(prompt + text for is_apart, prompt, texts in rows if not is_apart for text in texts)
    for prompt, is_apart, texts in zip(encoder.encode_prompts(prompts), apart, candidates, strict=True):
        if is_apart:
            yield prompt, *after[texts]
            continue
        encoded, merges = [], []
        for text in texts:
            ids = next(joint)
            merges.append(ids[: len(prompt)] != prompt)
            encoded.append(encoder.strip_eos(encoder.encode_bare(text) if merges[-1] else ids[len(prompt) :]))
        yield prompt, encoded, merges


def encode_texts(texts: list[str], max_length: int, split: bool, encoder: TextEncoder) -> Iterator[Iterator[Encoded]]:
    """Texts, supervised except for BOS, with end-of-sequence after the true end: the pieces of each text.

    split: cut a text longer than max_length into pieces, each with BOS if the tokenizer adds it; else truncate it.
    """
    for ids in encoder.encode_prompts(texts):
        del ids[: len(encoder.before)]
        yield _pieces(encoder.before, encoder.strip_eos(ids) + encoder.eos, max_length, split)


def _pieces(bos: Ids, body: Ids, max_length: int, split: bool) -> Iterator[Encoded]:
    size = max(max_length - len(bos), 0)
    split_body = split and size > 0
    truncated, blank = len(body) > size and not split_body, len(bos) + len(body) < 2
    for start in range(0, max(len(body), 1), size) if split_body else [0]:
        piece = body[start : start + size]
        full_length = len(bos) + len(piece if split_body else body)
        yield Encoded(bos + piece, _labels(len(bos), piece), full_length, truncated=truncated, blank=blank)
