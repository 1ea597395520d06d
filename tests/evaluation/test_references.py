"""Rows with the same prompt become one prompt with several references; in a chat the last turn is the reference."""

from lora_ft.data.encode import load_examples
from lora_ft.data.template import Template
from lora_ft.evaluation.references import group_by_prompt
from tests.data.test_chat import A1, A2, CHATML, U1, U2

PAIRS = Template(prompt="Review: {x} ->", completion=" {y}")
ROWS = [{"x": x, "y": y} for x, y in (("a", "one"), ("b", "two"), ("a", "three"), ("c", "four"), ("b", "one"))]


def test_rows_are_grouped_by_prompt(write, with_bos):
    path = write("rows.jsonl", [ROWS[0], {"x": None, "y": "bad"}, *ROWS[1:]])
    examples = load_examples([path], PAIRS, with_bos, max_length=50, bad_rows="skip")
    prompts = group_by_prompt(examples, PAIRS, with_bos, max_tokens=50)
    assert prompts.texts == ["Review: a ->", "Review: b ->", "Review: c ->"]
    assert prompts.references == [[" one", " three"], [" two", " one"], [" four"]]
    first = examples.dataset[0]
    assert prompts.ids[0] == first["input_ids"][: first["prompt_length"]] == with_bos("Review: a ->")["input_ids"]
    assert prompts.cut == 0


def test_a_held_out_part_has_only_its_own_references(write, plain):
    rows = [{"x": "abcdef"[i % 6], "y": f"n{i}"} for i in range(24)]
    path = write("rows.jsonl", rows)
    for which in (None, 0):
        part = load_examples([path], PAIRS, plain, max_length=50, held_out=[9], part=which, seed=2)
        own = [rows[i] for i in part.dataset["row"]]
        prompts = group_by_prompt(part, PAIRS, plain, max_tokens=50)
        assert sum(map(len, prompts.references)) == len(own)
        for prompt, references in zip(prompts.texts, prompts.references, strict=True):
            assert references == [f" {row['y']}" for row in own if f"Review: {row['x']} ->" == prompt]


def test_a_sample_of_rows_keeps_all_references_of_its_prompts(write, plain):
    rows = [{"x": "abcdef"[i % 6], "y": f"n{i}"} for i in range(24)]
    path = write("rows.jsonl", rows)
    for seed in (0, 1):
        part = load_examples([path], PAIRS, plain, max_length=50, max_examples=4, seed=seed)
        prompts = group_by_prompt(part, PAIRS, plain, max_tokens=50)
        assert prompts.texts == list(dict.fromkeys(f"Review: {rows[i]['x']} ->" for i in part.dataset["row"]))
        for prompt, references in zip(prompts.texts, prompts.references, strict=True):
            assert references == [f" {row['y']}" for row in rows if f"Review: {row['x']} ->" == prompt]


def test_a_sample_of_prompts_keeps_all_their_references(write, plain):
    examples = load_examples([write("rows.jsonl", ROWS)], PAIRS, plain, max_length=50)
    complete = group_by_prompt(examples, PAIRS, plain, max_tokens=50)
    references = dict(zip(complete.texts, complete.references, strict=True))
    for seed in range(5):
        some = group_by_prompt(examples, PAIRS, plain, max_tokens=50, max_prompts=2, seed=seed)
        assert len(some.texts) == 2 and some.references == [references[prompt] for prompt in some.texts]
        assert some == group_by_prompt(examples, PAIRS, plain, max_tokens=50, max_prompts=2, seed=seed)


def test_a_long_prompt_loses_its_start_but_not_bos(write, with_bos):
    examples = load_examples([write("rows.jsonl", ROWS[:1])], PAIRS, with_bos, max_length=50)
    prompts = group_by_prompt(examples, PAIRS, with_bos, max_tokens=4)
    ids = with_bos("Review: a ->")["input_ids"]
    assert prompts.ids == [[ids[0], *ids[-3:]]] and prompts.cut == 1


def test_the_last_turn_of_a_chat(write, plain):
    path = write("chats.jsonl", [{"messages": [U1, A1, U2, A2]}, {"messages": [U1, A1]}])
    template = Template(messages="messages", chat_template=CHATML)
    examples = load_examples([path], template, plain, max_length=200)
    prompts = group_by_prompt(examples, template, plain, max_tokens=200)
    assert prompts.references == [[A2["content"]], [A1["content"]]]
    for prompt, ids, chat in zip(prompts.texts, prompts.ids, ([U1, A1, U2], [U1]), strict=True):
        assert prompt == plain.apply_chat_template(
            chat, chat_template=CHATML, tokenize=False, add_generation_prompt=True
        )
        assert plain.decode(ids) == prompt
