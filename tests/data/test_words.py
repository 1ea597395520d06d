"""A prompt and a completion that stand apart have the same tokens together, for every tokenizer that is said to do so."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lora_ft.data.words import PATTERNS, ends_word, splits_at_spaces, start_words
from tests.data.conftest import LINES

ODD = [
    "don't",
    "'s",
    "'",
    "ABCd",
    "123456",
    "1,0",
    "...",
    "-x",
    "é",
    "e\u0301",
    "\u0301",
    "漢字",
    "😀",
    "👩‍👧",
    "ﬁ",
    "İ",
    "हि",
]
ODD += ["\n", "\r\n", "\t", "  ", " ", "\u00a0", "\u2028", "\x1c", "\ufeff", "<|im_end|>", "<m>", "Ġ", "the", "good"]
LAST = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def build(pre_tokenizer, normalizer=None, *added):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, alphabet = pre_tokenizer, sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*LINES, " ".join(ODD)] * 3, trainer)
    tokenizer.normalizer = normalizer or tokenizer.normalizer
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<m>", lstrip=True), *added])
    return tokenizer


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), LAST])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN = [GPT2, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), *map(split, PATTERNS)]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("pre_tokenizer", KNOWN)
def test_tokens_of_a_prompt_and_a_completion_that_stand_apart(pre_tokenizer, normalizer):
    tokenizer, generator, apart = build(pre_tokenizer, normalizer), random.Random(0), 0
    assert splits_at_spaces(tokenizer)
    for _ in range(2000):
        prompt, completion = ("".join(generator.choices(ODD, k=generator.randrange(8))) for _ in range(2))
        completion = generator.choice([" ", " ", ""]) + completion
        if ends_word(prompt) and start_words([completion]):
            apart += 1
            together = tokenizer.encode(prompt + completion).ids
            assert tokenizer.encode(prompt).ids + tokenizer.encode(completion).ids == together, (prompt, completion)
    assert apart > 500


@pytest.mark.parametrize(
    "other",
    [
        lambda: build(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: build(split(r"\d{1,3}(?=(\d{3})*\b)|\D+")),
        lambda: build(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), LAST])),
        lambda: build(GPT2, normalizers.Lowercase()),
        lambda: build(GPT2, None, AddedToken("two words")),
        lambda: build(GPT2, None, AddedToken("<r>", rstrip=True)),
        lambda: build(GPT2, None, AddedToken("word", single_word=True)),
        lambda: Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        lambda: Tokenizer(models.BPE(dropout=0.1)),
    ],
)
def test_other_tokenizers_are_not_said_to(other):
    assert not splits_at_spaces(other())


def test_where_texts_stand_apart():
    assert start_words([" b", " c"]) and not start_words([" b", "c"])
    assert ends_word("a:") and not any(map(ends_word, ("", "a ", "a\n", "a\u2028")))
