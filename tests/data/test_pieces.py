"""A long text has the same tokens in pieces as in one piece, whatever the tokenizer does."""

import os
import random
import signal
import threading
import time
import tracemalloc

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lora_ft.core.signals import Stopped, Stopper
from lora_ft.data import pieces, tokens
from lora_ft.data.chats.encode import encode_chats
from lora_ft.data.tokens import encode_pairs, encode_texts, text_encoder
from tests.data.conftest import LINES, build

RANDOM = random.Random(0)
WORDS = " ".join(LINES).split(" ") + ["\n\n", "  ", "日本語", "é", "👩‍👩‍👧", "<|im_end|>", "a" * 30, "12345", "..."]
TEXTS = {
    "words": " ".join(RANDOM.choices(WORDS, k=6000)),
    "one word": "".join(RANDOM.choices("abcdefgh", k=20000)),
    "one letter": "a" * 20001,
    "spaces": " " * 20001,
    "a long word among others": "So it goes. " * 300 + "ab" * 5000 + " fine thanks." * 300,
    "emoji": "👩‍👩‍👧" * 2000,
    "special tokens": "<|im_start|>" * 2000,
    "repeated after something else": "So it goes: " + "abcd" * 9000,
}


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def without_words():
    """As Llama 2's and Gemma's: merges run across the complete text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=["<unk>"], max_token_length=9)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, lstrip=True, rstrip=True)])
    return tokenizer


TOKENIZERS = {"bytes": lambda: text_encoder(build(bos=True)).bare, "unigram": unigram, "no words": without_words}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 1500)
    monkeypatch.setattr(tokens, "PIECE", 1500)
    monkeypatch.setattr(pieces, "GROUP", 1500)
    monkeypatch.setattr(pieces, "OVERLAP", 400)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_tokens_of_one_piece(small, name, text):
    tokenizer, text = TOKENIZERS[name](), TEXTS[text]
    ids, offsets = pieces.encode_long_with_offsets(tokenizer, text)
    whole = tokenizer.encode(text)
    assert pieces.encode_long(tokenizer, text).tolist() == ids.tolist() == whole.ids
    assert offsets.tolist() == [list(pair) for pair in whole.offsets]


def test_long_texts_are_read_in_pieces_and_short_ones_in_groups(small, monkeypatch):
    sizes = []
    real = pieces._encode
    monkeypatch.setattr(pieces, "_encode", lambda t, text, a, b: sizes.append(b - a) or real(t, text, a, b))
    text = TEXTS["words"]
    pieces.encode_long(TOKENIZERS["bytes"](), text)
    assert max(sizes) == 1500 and len(sizes) < len(text) / 1000
    texts = ["a" * 900, "b" * 600, "c", "d" * 9000, "", "e"]
    found = list(pieces.encoded_groups(lambda group: [f"{text[:1]}{len(text)}" for text in group], texts))
    assert found == [["a900", "b600"], ["c1"], "d" * 9000, ["0", "e1"]]
    assert list(pieces.encoded_groups(lambda group: group, [])) == []


def test_a_signal_stops_a_text_of_which_no_part_is_done(monkeypatch):
    """The tokenizer works beside the main thread: one that never returns is left when a signal raises."""

    class Endless:
        def encode(self, text):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(20)

    started = time.monotonic()
    with pytest.raises(Stopped), Stopper():
        pieces.encode_long(Endless(), "a")
    assert time.monotonic() - started < 5


def test_bytes_for_each_token(small):
    """Ids take 4 bytes a token, labels as many, and all else of a long text is dropped as it is written."""
    text, encoder = "qz" * 20_000, text_encoder(build())
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        tokens_seen = sum(len(e.input_ids) for row in encode_texts([text], 512, True, encoder) for e in row)
        split = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.reset_peak()
        spans = [[0, len(text)]]
        pair = next(encode_pairs([text], ["no"], [[]], spans, 512, "column", encoder))
        cut = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert tokens_seen == len(text) + 1 and len(pair.input_ids) <= 512
    piece = 1500 * 250  # as the tokenizer returns it: a tuple of two ints for each token
    assert split < piece + 20 * len(text) and cut < piece + 60 * len(text)


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (True, True)])
def test_examples_are_the_same(bos, eos, request):
    encoder, long = text_encoder(build(bos=bos, eos=eos)), TEXTS["words"]
    rows = ["short", long, "", long[:2000], "x"]
    spans = [[0, 5], [10, 9000, 9003, len(long)], [], [5, 1990], [0, 1]]

    def encoded():
        return [
            list(map(list, encode_texts(rows, 900, True, encoder))),
            list(map(list, encode_texts(rows, 900, False, encoder))),
            list(encode_pairs(rows, rows[::-1], [[], [], ["", "b", long], [], []], [[]] * 5, 900, "start", encoder)),
            list(encode_chats(rows, spans, [[] for _ in rows], 10**6, "column", encoder)),
        ]

    expected = encoded()
    request.getfixturevalue("small")
    assert encoded() == expected
