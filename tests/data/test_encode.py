"""Prompts, completions and texts compared with row-by-row encodings; bad rows; caching; held-out parts."""

import itertools
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from lora_ft.core.errors import ConfigError, DataError
from lora_ft.data import cache, encode, texts
from lora_ft.data.encode import load_examples
from lora_ft.data.examples import held_out_count, sample_indices
from lora_ft.data.template import Template

PAIR = Template(prompt="Review: {text}\nSentiment:", completion=" {label}")
WORDS = ["positive", "negative", "so it goes"]
CLASSES = Template(PAIR.prompt, PAIR.completion, label_names={"label": WORDS})
ROWS = [{"text": f"film {i} " + "warm and funny " * (i % 5), "label": "positive"} for i in range(40)]


def load(path, template, tokenizer, max_length=64, **settings):
    return load_examples([path], template, tokenizer, max_length=max_length, **{"truncate": "start"} | settings)


def ids(tokenizer, text, special=True):
    found = tokenizer(text, add_special_tokens=special)["input_ids"]
    return found[:-1] if special and found and found[-1] == tokenizer.eos_token_id else found


def oracle(tokenizer, prompt, completion, max_length, room=0):
    """(ids, labels, prompt length) by the design's rules, one row at a time."""
    before, joint = ids(tokenizer, prompt), ids(tokenizer, prompt + completion)
    answer = joint[len(before) :] if joint[: len(before)] == before else ids(tokenizer, completion, False)
    answer = answer + [tokenizer.eos_token_id]
    bos = before[:1] if before[:1] == [tokenizer.bos_token_id] else []
    body = before[len(bos) :]
    while body and len(bos) + len(body) + max(len(answer), room) > max_length:
        body = body[1:]
    while len(bos) + len(body) + len(answer) > max_length:
        answer = answer[:-1]
    labels = [-100] * len(bos + body) + answer
    labels[0] = -100
    return bos + body + answer, labels, len(bos + body)


@pytest.mark.parametrize("bos, eos", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("max_length", [200, 30, 22, 9, 4, 3])
def test_pairs(write, make_tokenizer, bos, eos, max_length):
    tokenizer = make_tokenizer(bos, eos)
    examples = load(write("a.jsonl", ROWS), PAIR, tokenizer, max_length)
    assert len(examples.dataset) == len(ROWS)
    truncated = 0
    for i, (row, example) in enumerate(zip(ROWS, examples.dataset, strict=True)):
        prompt, completion = f"Review: {row['text']}\nSentiment:", f" {row['label']}"
        expected = oracle(tokenizer, prompt, completion, max_length)
        assert (example["input_ids"], example["labels"], example["prompt_length"]) == expected
        assert (example["row"], example["choices"], example["label"]) == (i, [], -1)
        truncated += len(expected[0]) < len(oracle(tokenizer, prompt, completion, 10**6)[0])
    report = examples.report
    assert (report.rows, report.used, report.truncated, report.dropped, report.merged) == (40, 40, truncated, 0, 0)
    assert report.tokens == sum(map(len, examples.dataset["input_ids"]))
    assert report.supervised == sum(x != -100 for labels in examples.dataset["labels"] for x in labels)
    assert report.longest == max(map(len, examples.dataset["input_ids"]))
    assert set(examples.dataset.features) >= {"input_ids", "labels", "row", "prompt_length", "choices", "label"}
    assert examples.dataset.features["input_ids"] == datasets.List(datasets.Value("int32"))


def test_tokens_that_merge_across_the_boundary(write, plain):
    template = Template(prompt="{a}", completion="{b}")
    rows = [{"a": "Senti", "b": "ment: positive"}, {"a": "film,", "b": " warm"}]
    examples = load(write("a.jsonl", rows), template, plain)
    merged = [ids(plain, r["a"] + r["b"])[: len(ids(plain, r["a"]))] != ids(plain, r["a"]) for r in rows]
    assert merged == [True, False]  # otherwise this test is void
    assert examples.dataset["merged"][:] == merged and examples.report.merged == 1
    first = ids(plain, "Senti") + ids(plain, "ment: positive", False) + [plain.eos_token_id]
    assert examples.dataset[0]["input_ids"] == first


def test_end_of_sequence(write, make_tokenizer, plain):
    path = write("a.jsonl", [{"a": "hello", "b": " there"}, {"a": "hello", "b": ""}, {"a": "hello", "b": " x</s>"}])
    template = Template(prompt="{a}", completion="{b}")
    end = plain.eos_token_id
    found = [e["labels"] for e in load(path, template, plain).dataset]
    assert [labels.count(end) for labels in found] == [1, 1, 1] and all(labels[-1] == end for labels in found)
    assert load(path, template, plain).report.empty == 1
    assert "1 with an empty completion" in load(path, template, plain).report.summary()
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match=":2: nothing in it is supervised"):
        load(path, template, endless)
    without = load(path, template, endless, bad_rows="skip")
    assert without.dataset["row"][:] == [0, 2]
    assert [labels.count(end) for labels in without.dataset["labels"]] == [
        0,
        1,
    ]  # the one that the row spells out is kept


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [60, 40])
def test_a_long_prompt_loses_the_middle_of_its_longest_column(write, make_tokenizer, bos, max_length):
    tokenizer = make_tokenizer(bos)
    context = "so it goes " + "warm and funny " * 30 + "at the end"
    path = write(
        "a.jsonl",
        [{"task": "Review", "context": context, "q": "is it \u00e9\u4e2d?"}, {"task": "a", "context": "b", "q": "c"}],
    )
    template = Template("{task}: {context}\nQ: {q}\nA:", " {task}")
    examples = load(path, template, tokenizer, max_length, truncate="column")
    text = tokenizer.decode(examples.dataset[0]["input_ids"], skip_special_tokens=True)
    head, tail = text.split(" [...] ")
    assert head.startswith("Review: so") and tail.endswith("\nQ: is it \u00e9\u4e2d?\nA: Review")
    assert context.startswith(head.removeprefix("Review: ")) and context.endswith(tail.split("\n")[0])
    assert max_length - 1 <= len(examples.dataset[0]["input_ids"]) <= max_length
    assert examples.dataset["truncated"][:] == [True, False]
    at_end = load(path, template, tokenizer, max_length, truncate="end")
    kept = at_end.dataset[0]["input_ids"][: at_end.dataset[0]["prompt_length"]]
    assert (
        tokenizer.decode(kept, skip_special_tokens=True)
        == f"Review: {context}"[: len(tokenizer.decode(kept, skip_special_tokens=True))]
    )
    assert (
        len(
            {
                load(path, template, tokenizer, n, truncate=t).report.sha256
                for n in (max_length, 999)
                for t in ("start", "column")
            }
        )
        == 3
    )


@pytest.mark.parametrize("max_length", range(24, 60))
def test_no_character_is_cut_and_equal_columns_share(write, plain, max_length):
    rows = [{"a": "\u4e2d\u6587\u00e9" * 20, "b": "\u4e2d\u6587" * 30, "c": "x"}]
    template = Template("{a}|{b}|{c}", "{c}")
    (example,) = load(write("a.jsonl", rows), template, plain, max_length, truncate="column").dataset
    text = plain.decode(example["input_ids"])
    assert "\ufffd" not in text and text.count(" [...] ") == 2 and text.endswith("|xx</s>")
    assert max_length - 8 <= len(example["input_ids"]) <= max_length


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [200, 24, 18])
def test_choices(write, make_tokenizer, bos, max_length):
    tokenizer = make_tokenizer(bos)
    rows = [{"text": r["text"], "label": [i % 3, str(i % 3), WORDS[i % 3]][i % 7 % 3]} for i, r in enumerate(ROWS)]
    examples = load(write("a.jsonl", rows), CLASSES, tokenizer, max_length)
    assert examples.label_words == WORDS
    for i, example in enumerate(examples.dataset):
        prompt = f"Review: {rows[i]['text']}\nSentiment:"
        before = ids(tokenizer, prompt)
        choices = [ids(tokenizer, f"{prompt} {word}")[len(before) :] for word in WORDS]
        assert example["choices"] == choices and example["label"] == i % 3
        room = max(map(len, choices)) + 1
        expected = oracle(tokenizer, prompt, f" {WORDS[i % 3]}", max_length, room)
        assert (example["input_ids"], example["labels"], example["prompt_length"]) == expected
        assert example["input_ids"][example["prompt_length"] :] == [*choices[i % 3], tokenizer.eos_token_id]
        assert example["prompt_length"] + room <= max_length


@pytest.mark.parametrize("completion", [" it is {label} then", " {label}: {text}", " {label}[[ ({note})]]"])
def test_choices_are_those_of_the_row(write, plain, completion):
    rows = [{"text": f"film {i}", "label": i % 3, "note": "x" * (i % 2)} for i in range(6)]
    examples = load(write("a.jsonl", rows), Template("So", completion, label_names={"label": WORDS}), plain)
    before = len(ids(plain, "So"))
    for row, example in zip(rows, examples.dataset, strict=True):
        form = completion.replace("[[", "").replace("]]", "") if row["note"] else completion.partition("[[")[0]
        wanted = [ids(plain, "So" + form.format(**row | {"label": word}))[before:] for word in WORDS]
        assert example["choices"] == wanted and example["input_ids"][before:-1] == wanted[row["label"]]


def test_no_choices_without_a_labelled_column_in_the_completion(write, plain):
    path = write("a.jsonl", [{"text": "x", "label": 1}])
    examples = load(path, Template("{label}: ", "{text}", label_names={"label": ["a", "b"]}), plain)
    assert plain.decode(examples.dataset[0]["input_ids"]) == "b: x</s>"
    assert examples.dataset[0]["choices"] == [] and examples.label_words == []


def test_label_words_with_equal_tokens_are_rejected(write, plain):
    template = Template("{text}", " {label}", label_names={"label": ["same", "same"]})
    with pytest.raises(DataError, match="equal tokens"):
        load(write("a.jsonl", [{"text": "x", "label": 1}]), template, plain)


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("long_text", ["truncate", "split"])
@pytest.mark.parametrize("max_length", [100, 7, 2])
def test_texts(write, make_tokenizer, bos, eos, long_text, max_length):
    tokenizer = make_tokenizer(bos, eos)
    rows = [{"t": "so it goes " * n + "end"} for n in range(6)]
    examples = load(write("a.jsonl", rows), Template(text="{t}"), tokenizer, max_length, long_text=long_text)
    start, expected = [tokenizer.bos_token_id] * bos, []
    for i, row in enumerate(rows):
        body = ids(tokenizer, row["t"], False) + [tokenizer.eos_token_id]
        size = max_length - bos
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        for piece in pieces if long_text == "split" else pieces[:1]:
            labels = [-100] * bos + piece
            if len(labels) > 1:  # no token predicts a lone token
                expected.append((i, start + piece, [-100, *labels[1:]]))
    assert [(e["row"], e["input_ids"], e["labels"]) for e in examples.dataset] == expected
    assert (examples.report.used, examples.report.examples) == (6, len(expected))
    cut = sum(len(ids(tokenizer, r["t"])) + 1 > max_length for r in rows)
    assert examples.report.truncated == (cut if long_text == "truncate" else 0)


def test_rows_with_nothing_supervised_after_truncation_are_dropped_and_counted(write, with_bos):
    rows = [{"a": "x", "b": "y"}, {"a": "x", "b": "y"}]
    path = write("a.jsonl", rows)
    with pytest.raises(DataError, match="Raise data.max_length"):
        load(path, Template("{a}", "{b}"), with_bos, max_length=1)
    chat = "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    turns = [[{"role": "user", "content": "hello " * n}, {"role": "assistant", "content": "yes"}] for n in (1, 50)]
    chats = write("c.jsonl", [{"m": t} for t in turns])
    examples = load(chats, Template(messages="m", chat_template=chat), with_bos, max_length=30, truncate="end")
    assert (examples.report.rows, examples.report.used, examples.report.dropped) == (2, 1, 1)


OPTIONAL = "{task}[[\n{input} at {place}]]! [[[[{task}]]]] [[A]] [[[{input}]]] ]]"


@pytest.mark.parametrize(
    "row, text",
    [
        ({"input": "b", "place": "c"}, "a\nb at c! [[a]] [[A]] [b] ]]"),
        ({"input": "", "place": 0}, "a\n at 0! [[a]] [[A]]  ]]"),
        ({"input": None, "place": "c"}, "a\n at c! [[a]] [[A]]  ]]"),
        *(({"input": empty, "place": empty}, "a! [[a]] [[A]]  ]]") for empty in ("", " \n", None, float("nan"))),
        ({}, "a! [[a]] [[A]]  ]]"),
    ],
)
def test_parts_in_brackets_are_left_out_where_their_columns_are_empty(write, plain, row, text):
    path = write("a.jsonl", [{"task": "a"} | row, {"task": "", "input": "x", "place": "y"}])
    for template in (Template(text=OPTIONAL), Template(OPTIONAL, "{task}"), Template("{task}", OPTIONAL)):
        found = load(path, template, plain)
        rendered = found.texts[0]["prompt" if template.completion == "{task}" else "completion"]
        assert rendered == text and not found.report.notes
    with pytest.raises(DataError, match=':1: no column "task"'):
        load(write("b.jsonl", [{"input": "b"}]), Template(text=OPTIONAL), plain)


def test_an_optional_column_that_no_row_has_is_told(write, plain):
    path = write("a.jsonl", [{"text": "x", "inputs": ""}, {"text": "y"}])
    (note,) = load(path, Template("{text}[[{input}]]", "{text}"), plain).report.notes
    assert 'no row has the column "input"' in note and 'Did you mean "inputs"?' in note


BAD = [
    ({"text": "x"}, 'no column "label"; the row has "text"'),
    ({"text": "x", "labl": 1}, 'Did you mean "labl"?'),
    ({"text": None, "label": 1}, 'column "text" is null'),
    ({"text": float("nan"), "label": 1}, 'column "text" is NaN'),
    ({"text": ["x"], "label": 1}, 'column "text" is a list'),
    ({"text": {"x": 1}, "label": 1}, 'column "text" is an object'),
    ({"text": "\ud800", "label": 1}, "lone surrogate"),
    ({"text": "x", "label": 3}, 'column "label" is class 3'),
    ({"text": "x", "label": "-1"}, 'column "label" is "-1"'),
    ({"text": "x", "label": "\x1b[31mred"}, r"\\x1b\[31mred"),
    ({"text": "x", "label": 0.5}, 'column "label" is a fraction'),
    ({"text": "x", "label": None}, 'column "label" is null'),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_rows(write, plain, bad, message):
    good = {"text": "x", "label": 1}
    path = write("a.jsonl", [good, bad, good])
    with pytest.raises(DataError, match=message.replace("?", r"\?")) as caught:
        load(path, CLASSES, plain)
    assert str(caught.value).startswith(f"{path}:2: ") and "bad_rows" in str(caught.value)
    assert str(caught.value).isprintable()
    examples = load(path, CLASSES, plain, bad_rows="skip")
    assert examples.dataset["row"][:] == [0, 2] and examples.dataset["where"][:] == [f"{path}:1", f"{path}:3"]
    assert (examples.report.skipped_count, examples.report.used) == (1, 2)
    assert examples.report.skipped[0].startswith(f"{path}:2: ")
    with pytest.raises(DataError):  # rows skipped before are still an error
        load(path, CLASSES, plain)


def test_many_bad_rows_are_counted_and_the_first_listed(write, plain):
    path = write("a.jsonl", [{"text": "x"}] * 30 + [{"text": "x", "label": 0}])
    report = load(path, CLASSES, plain, bad_rows="skip").report
    assert (report.skipped_count, len(report.skipped)) == (30, 20)
    with pytest.raises(DataError, match="all 30 rows are bad"):
        load(write("b.jsonl", [{"text": "x"}] * 30), CLASSES, plain, bad_rows="skip")


def test_malformed_lines_are_bad_rows(write, plain):
    """A wrong number of fields, or broken JSON: reading continues with the next line."""
    for name, content in (
        ("a.csv", "text,label\nx,y\nx\nx,y,z\nx,y\n"),
        ("a.tsv", "text\tlabel\nx\ty\nx\nx\ty\tz\nx\ty\n"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text": \n[1]\n{"text": "x", "label": "y"}\n'),
        ("a.json", '[{"text": "x", "label": "y"},\n1,\n[1],\n{"text": "x", "label": "y"}]\n'),
    ):
        path = write(name, content)
        report = load(path, PAIR, plain, bad_rows="skip").report
        assert (report.rows, report.used, report.skipped_count) == (4, 2, 2)
        with pytest.raises(DataError, match="Fix the row, or skip such rows") as caught:
            load(path, PAIR, plain)
        assert str(caught.value).startswith(f"{path}:{2 if 'json' in name else 3}: ")


def test_hints_for_missing_headers_and_misspelled_labels(write, plain):
    with pytest.raises(DataError, match=r'no column "text".*no header line.*data.format: {header: '):
        load(write("a.csv", "Where is it?,0\nWhere am I?,1\n"), PAIR, plain)
    with pytest.raises(DataError, match=r'is "Positive".* Did you mean "positive"\?'):
        load(write("a.jsonl", [{"text": "x", "label": "Positive"}]), CLASSES, plain)


def test_values_inside_columns(write, plain):
    path = write("a.jsonl", [{"q": "when", "a": {"text": ["1910", "in 1910"], "at": [3, 4]}}])
    (example,) = load(path, Template("{q}", " {a[text][0]} {a[at][1]}"), plain).dataset
    assert plain.decode(example["input_ids"]) == "when 1910 4</s>"
    for wrong in ("{a[text][2]}", "{a[texts][0]}", "{q[text]}"):
        with pytest.raises(DataError, match=r"a\.jsonl:1: column .* has no value for"):
            load(path, Template("{q}", wrong), plain)


def test_numbers_in_templates_and_label_words_of_digits(write, plain):
    path = write("a.jsonl", [{"i": 3, "f": 2.5, "b": True, "s": "é{x}"}])
    example = load(path, Template("{i} {f} {b} {{i}}", "{s}"), plain).dataset[0]
    assert plain.decode(example["input_ids"]) == "3 2.5 True {i}é{x}</s>"
    stars = Template("{s}", " {n}", label_names={"n": ["1", "2", "3"]})
    path = write("b.jsonl", [{"s": "x", "n": "1"}, {"s": "x", "n": 2}])
    assert load(path, stars, plain).dataset["label"][:] == [1, 2]  # always ids, never words
    with pytest.raises(DataError, match="class 3.*words of digits are not read as words"):
        load(write("c.jsonl", [{"s": "x", "n": "3"}]), stars, plain)


def test_empty_data(write, plain):
    for name, content in [("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.csv", "text,label\n"), ("d.json", "[]")]:
        with pytest.raises(DataError, match="no rows"):
            load(write(name, content), PAIR, plain)
    with pytest.raises(DataError, match="its text is empty"):
        load(write("e.jsonl", [{"t": ""}]), Template(text="{t}"), plain)
    with pytest.raises(ConfigError, match="data.prompt"):
        load(write("f.jsonl", ROWS), Template("{text", "x"), plain)


def test_several_sources_are_concatenated(write, plain):
    a, b = write("a.jsonl", ROWS[:3]), write("b.csv", "text,label\nfour,positive\n")
    examples = load_examples([a, b], PAIR, plain, max_length=64)
    assert examples.dataset["row"][:] == [0, 1, 2, 3] and examples.dataset["where"][3] == f"{b}:2"


def test_sample_is_seeded_ordered_and_taken_before_encoding(write, plain):
    path = write("a.jsonl", ROWS)
    picks = {}
    for seed in (0, 1):
        examples = load(path, PAIR, plain, max_examples=10, seed=seed)
        picks[seed] = examples.dataset["row"][:]
        assert picks[seed] == sorted(set(picks[seed])) and len(picks[seed]) == 10
        full = load(path, PAIR, plain, seed=seed)
        assert sample_indices(40, 10, seed).tolist() == picks[seed]
        assert (
            examples.report.not_sampled == 30
            and "10 of 40 rows used, 30 not in the sample" in examples.report.summary()
        )
        assert [full.dataset[i]["input_ids"] for i in picks[seed]] == examples.dataset["input_ids"][:]
    assert picks[0] != picks[1]
    assert len(load(path, PAIR, plain, max_examples=1000).dataset) == 40


def test_hold_out(write, plain):
    rows = [{"t": "so it goes " * (i % 4) + str(i)} for i in range(50)]
    path = write("a.jsonl", [*rows, {"t": None}])

    def load_side(part, *amounts, seed=3, **settings):
        settings |= {"held_out": amounts, "part": part, "seed": seed, "long_text": "split", "bad_rows": "skip"}
        return load(path, Template(text="{t}"), plain, 6, **settings)

    everything = load_side(None)
    for amount, count in ((7, 7), (0.1, 5), (0.001, 1)):
        rest, held = load_side(None, amount), load_side(0, amount)
        a, b = set(rest.dataset["row"]), set(held.dataset["row"])
        assert len(b) == count == held.report.used == held.report.rows and not a & b and a | b == set(range(50))
        assert len(rest.dataset) + len(held.dataset) == len(everything.dataset)  # the pieces of a row stay together
        assert rest.report.tokens + held.report.tokens == everything.report.tokens
        assert held.report.tokens == sum(map(len, held.dataset["input_ids"]))
        assert (rest.report.held_out, rest.report.skipped_count, held.report.skipped_count) == (count, 1, 0)
        assert f"{50 - count} of 51 rows used, {count} held out for evaluation" in rest.report.summary()
        assert set(load_side(0, amount).dataset["row"]) == b
        assert set(load_side(0, amount, seed=4).dataset["row"]) != b
        some, few = load_side(None, amount, max_examples=9), load_side(0, amount, max_examples=1)
        assert set(some.dataset["row"]) < a and set(few.dataset["row"]) <= b
        assert (some.report.used, some.report.not_sampled, few.report.used) == (9, 41 - count, 1)
        assert (few.report.rows, few.report.not_sampled) == (count, count - 1)
    several = [load_side(part, 7, 0.1, 3) for part in (0, 1, 2, None)]  # each from what the ones before have left
    assert [examples.report.used for examples in several] == [7, 4, 3, 36] and several[3].report.held_out == 14
    assert sorted(row for examples in several for row in set(examples.dataset["row"])) == list(range(50))
    for amount in (50, 60, 0):
        with pytest.raises(DataError, match="data.eval"):
            held_out_count(50, amount)


def test_only_rows_in_use_are_encoded(write, plain, monkeypatch):
    path, encoded = write("a.jsonl", ROWS), []
    real = encode.encode_pairs
    monkeypatch.setattr(encode, "encode_pairs", lambda prompts, *a: encoded.extend(prompts) or real(prompts, *a))
    load(path, PAIR, plain, held_out=[0.5], max_examples=3)
    load(path, PAIR, plain, held_out=[0.5], part=0, max_examples=2)
    assert len(encoded) == 5


def test_tables_are_computed_once(write, plain, monkeypatch, own_cache):
    path = write("a.jsonl", ROWS)
    first = load(path, CLASSES, plain)
    reads, encodings = [], []
    monkeypatch.setattr(texts, "iter_rows", lambda s: reads.append(s) or iter(()))
    monkeypatch.setattr(encode, "encode_pairs", lambda *a: encodings.append(a) or iter(()))
    again = load(path, CLASSES, plain)
    assert not reads and not encodings
    assert again.report == first.report and again.dataset[:] == first.dataset[:]
    assert again.dataset.cache_files[0]["filename"].startswith(str(own_cache))  # memory-mapped
    monkeypatch.undo()


def test_all_rows_are_encoded_once_for_runs_of_any_seed(write, plain, monkeypatch, own_cache):
    path, encodings = write("a.jsonl", ROWS), []
    real = encode.encode_pairs
    monkeypatch.setattr(encode, "encode_pairs", lambda *a: encodings.append(a) or real(*a))
    first, other = (load(path, PAIR, plain, seed=seed, max_examples=len(ROWS)) for seed in (0, 1))
    assert len(encodings) == 1 and other.dataset[:] == first.dataset[:]
    assert other.report.sha256 != first.report.sha256  # as records of earlier versions have it
    samples = [load(path, PAIR, plain, seed=seed, max_examples=len(ROWS) - 1).dataset["row"] for seed in (0, 1, 2)]
    assert len(set(map(tuple, samples))) > 1


def test_tables_are_recomputed_when_anything_they_depend_on_changes(write, make_tokenizer, plain):
    path = write("a.jsonl", ROWS)
    shas = [load(path, PAIR, plain).report.sha256]
    for other in (
        lambda: load(path, PAIR, plain, max_length=20),
        lambda: load(path, Template(PAIR.prompt, "{label}"), plain),
        lambda: load(path, PAIR, make_tokenizer(bos=True)),
        lambda: load(path, PAIR, plain, max_examples=5),
        lambda: load(path, PAIR, plain, max_examples=5, seed=1),
        lambda: load(write("a.jsonl", ROWS[1:]), PAIR, plain),  # the same name, other content
    ):
        shas.append(other().report.sha256)
    assert len(set(shas)) == len(shas)
    moved = load(write("moved.jsonl", ROWS), PAIR, plain)
    assert moved.report.sha256 == shas[0] and "moved.jsonl" in moved.dataset[0]["where"]


@pytest.mark.parametrize(
    "template, settings, sha256",
    [
        (Template("{t}:", " {l}", label_names={"l": ["x", "y"]}), {}, "436bbcb0dbede3e58b9312382cbdc1c2"),
        (Template(text="{t}"), {"long_text": "split", "held_out": (1,), "part": 0}, "29b0cbff347df4ba7586199f45c5badd"),
        (
            Template(
                messages="m", chat_template="{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}"
            ),
            {"max_examples": 2, "seed": 1, "bad_rows": "skip"},
            "86d1d936211c723bdbcb8549875ad708",
        ),
    ],
)
def test_hashes_in_records_are_stable_across_versions(write, plain, monkeypatch, template, settings, sha256):
    """--resume compares them with the record of a run, which an earlier version may have written."""
    monkeypatch.setattr(encode, "tokenizer_hash", lambda tokenizer: "tokenizer")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    report = load(write("a.jsonl", [{"t": "a b", "l": 1, "m": chat}] * 3), template, plain, **settings).report
    assert (report.content[:16], report.sha256[:32]) == ("ee1f17f8ff8dc7ea", sha256)


def test_a_damaged_entry_is_recomputed(write, plain, own_cache):
    path = write("a.jsonl", ROWS)
    first = load(path, PAIR, plain).dataset[:]
    for file in (own_cache / "lora_ft").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert load(path, PAIR, plain).dataset[:] == first
    for file in (own_cache / "lora_ft").glob("*.arrow"):
        file.unlink()
    assert load(path, PAIR, plain).dataset[:] == first


def test_a_read_only_cache_is_replaced_by_a_temporary_folder(write, plain, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(tmp_path / "file" / "below"))
    assert len(load(write("a.jsonl", ROWS), PAIR, plain).dataset) == 40


def test_a_failure_leaves_nothing_in_the_cache(write, plain, own_cache):
    with pytest.raises(DataError):
        load(write("a.jsonl", '{"text": "x", "label": "y"}\n' * 1500 + "{\n"), PAIR, plain)
    assert not list((own_cache / "lora_ft").iterdir())


def test_more_rows_than_a_batch(write, plain):
    rows = [{"text": str(i), "label": "x" * (i % 3)} for i in range(2500)]
    examples = load(write("a.jsonl", rows), PAIR, plain)
    assert np.array_equal(examples.dataset["row"][:], range(2500))
    for i in (0, 999, 1000, 2499):
        expected = oracle(plain, f"Review: {i}\nSentiment:", " " + "x" * (i % 3), 64)[0]
        assert examples.dataset[i]["input_ids"] == expected


def test_old_entries_are_removed_when_the_cache_is_too_large(write, plain, own_cache, monkeypatch):
    folder, names = own_cache / "lora_ft", "abcd"
    made: dict[str, set[Path]] = {}
    for age, name in enumerate(names):  # a is the oldest
        before = set(folder.glob("*"))
        load(write(f"{name}.jsonl", [{"text": name * 9, "label": "x"}] * 100), PAIR, plain)
        made[name] = set(folder.glob("*")) - before
        for path in made[name]:
            os.utime(path, (1e9 + age, 1e9 + age))
    foreign = [folder / "notes.arrow", folder / ("f" * 64 + ".txt"), folder.parent / "other.arrow"]
    left = folder / ("e" * 64 + ".arrow.1-ab.partial")
    for path in (*foreign, left):
        path.write_bytes(b"x" * 10**6)
        os.utime(path, (1e9, 1e9))
    load(write("a.jsonl", [{"text": "a" * 9, "label": "x"}] * 100), PAIR, plain)  # used again: the newest
    size = sum(p.stat().st_size for p in folder.glob("*.arrow") if p not in foreign)
    monkeypatch.setattr(cache, "MAX_BYTES", size * 3 // 4)
    held = load(write("d.jsonl", [{"text": "d" * 9, "label": "x"}] * 100), PAIR, plain)
    load(write("e.jsonl", [{"text": "e" * 9, "label": "x"}] * 100), PAIR, plain)
    assert not any(p.exists() for p in made["b"] | {left}), "unused for longest"
    assert all(p.exists() for p in [*made["a"], *made["d"], *foreign]), "used today, or not ours"
    monkeypatch.setattr(cache, "MAX_BYTES", 0)
    monkeypatch.setattr(cache, "DAY_SECONDS", -60.0)
    load(write("f.jsonl", ROWS), PAIR, plain)
    assert not list(folder.glob("*[0-9a-f].json")) and held.dataset[0]["tokens"] > 0, "still mapped"
