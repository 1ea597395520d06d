"""What a row may say: the forms of turns, tool calls and tools, which turns count, and what has no effect."""

import json

import datasets
import pytest

from lora_ft.core.errors import DataError
from lora_ft.data.chats.raw_turns import asked_messages
from lora_ft.data.chats.turns import read_conversation, read_prompt
from lora_ft.data.encode import load_examples
from lora_ft.data.sources import iter_rows
from lora_ft.data.template import BadRow, Template

CALLS = (  # as Qwen2.5: tools in the system turn, calls as JSON
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_CALLS = (
    "{% for m in messages if m.role != 'developer' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "so"}
SAY = {"role": "assistant", "content": "it goes"}
E = "<|im_end|>"


def schema(name: str, **properties: str) -> dict:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"the {name}", "parameters": parameters}}


def calling(name: str, **arguments) -> list[dict]:
    """A chat with one call."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "ok"}, SAY]


ROWS = [
    {"messages": calling("weather", city="Rome", days=2), "tools": [schema("weather", city="string", days="integer")]},
    {"messages": calling("add", a=1, more={"b": [2, 3]}), "tools": [schema("add", a="integer")]},
    {"messages": [ASK, SAY], "tools": [schema("add", a="integer")]},
]


def load(source: str, tokenizer, template: str = CALLS, messages: str = "messages", **settings):
    loading = {"bad_rows": settings.pop("bad_rows", "error")}
    wanted = Template(messages=messages, chat_template=template, **settings)
    return load_examples([source], wanted, tokenizer, max_length=1000, **loading)


def supervised(examples, tokenizer, row: int = 0) -> list[str]:
    example = examples.dataset[row]
    runs: list[list[int]] = [[]]
    for label in example["labels"]:
        runs = runs if label < 0 and not runs[-1] else [*runs, []] if label < 0 else [*runs[:-1], [*runs[-1], label]]
    return [tokenizer.decode(run) for run in runs if run]


def test_the_same_tokens_from_every_file(write, plain, tmp_path):
    """Parquet and a hub data set fill ragged objects with nulls; JSON text has none; all give the same."""
    parquet, split = str(tmp_path / "rows.parquet"), datasets.Dataset.from_list(ROWS)
    split.to_parquet(parquet)
    assert any("null" in json.dumps(row) for _, row, _ in iter_rows(parquet))
    as_text = [{"messages": json.dumps(r["messages"]), "tools": json.dumps(r["tools"])} for r in ROWS]
    in_calls = json.loads(json.dumps(ROWS))
    for row in in_calls:
        for call in (call for turn in row["messages"] for call in turn.get("tool_calls", [])):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        row["tools"] = [json.dumps(tool) for tool in row["tools"]]
    files = [
        write("rows.jsonl", ROWS),
        write("rows.json", json.dumps(ROWS)),
        parquet,
        write("text.jsonl", as_text),
        write("in_calls.jsonl", in_calls),
    ]
    first, *others = [load(file, plain).dataset for file in files]
    for other in others:
        assert other["input_ids"][:] == first["input_ids"][:] and other["labels"][:] == first["labels"][:]
    text = plain.decode(first[0]["input_ids"])
    assert '"name": "weather"' in text and "null" not in text


def test_turns_as_an_object_of_lists(write, plain):
    """`datasets` gives a Sequence of turns as lists by key."""
    columns = {"role": ["user", "assistant"], "content": ["so", "it goes"]}
    examples = load(write("a.jsonl", [{"messages": columns}]), plain)
    assert supervised(examples, plain) == ["it goes" + E]


def test_share_gpt_with_calls_system_and_tools(write, plain):
    row = {
        "conversations": [
            {"from": "human", "value": "so"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": '{"ok": true}'},
            {"from": "gpt", "value": "it goes"},
        ],
        "system": "Be brief.",
        "tools": json.dumps([schema("add", a="integer")]),
    }
    examples = load(write("a.jsonl", [row]), plain, messages="conversations")
    assert supervised(examples, plain) == ['<call>add {"a": 1}</call>' + E, "it goes" + E]
    text = plain.decode(examples.dataset[0]["input_ids"])
    assert '"the add"' in text and "system\nBe brief." in text and 'tool\n{"ok": true}' in text
    assert not examples.report.notes
    assert examples.report.turns["assistant with tool calls"] == [1, 1] and examples.report.turns["tool"] == [1, 0]


def test_legacy_function_calls(write, plain):
    turn = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    row = {"messages": [ASK, turn, {"role": "function", "name": "add", "content": "1"}, SAY]}
    row["functions"] = [schema("add", a="integer")["function"]]
    examples = load(write("a.jsonl", [row]), plain)
    assert supervised(examples, plain) == ['<call>add {"a": 1}</call>' + E, "it goes" + E]
    assert '"the add"' in plain.decode(examples.dataset[0]["input_ids"])


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0, "train": True}])
def test_turns_that_do_not_count(write, plain, off):
    chat = [ASK, SAY | off, ASK, {"role": "assistant", "content": "fine"} | {key: 1 for key in off}]
    examples = load(write("a.jsonl", [{"messages": chat}]), plain)
    assert supervised(examples, plain) == ["fine" + E] and not examples.report.notes
    assert examples.report.turns["assistant"] == [2, 1]
    with pytest.raises(DataError, match="every assistant turn has weight 0"):
        load(write("b.jsonl", [{"messages": [ASK, SAY | off]}]), plain)


def test_supervise_last(write, plain):
    chat = [ASK, SAY, ASK, {"role": "assistant", "content": "fine"}, ASK]
    assert supervised(load(write("a.jsonl", [{"messages": chat}]), plain, supervise="last"), plain) == ["fine" + E]


def test_what_has_no_effect_is_counted(write, plain):
    rows = [
        {"messages": [{"role": "developer", "content": "Be kind."}, ASK, SAY | {"loss": False}]},
        {"messages": [ASK | {"train": True}, SAY | {"reasoning": "it must"}], "images": ["a.png"]},
        {"messages": [{"role": "developer", "content": "Be brief."}, ASK, SAY], "tools": [schema("add")]},
    ]
    report = load(write("a.jsonl", rows), plain, NO_CALLS).report
    assert report.used == 3
    told = {note.split(" (")[0]: note for note in report.notes}
    assert "2 times, first in" in told["the chat template drops turns of the developer"]
    assert "a.jsonl:1, turn 1" in told["the chat template drops turns of the developer"]
    assert "a.jsonl:2, turn 2" in told["the chat template drops the reasoning"]
    assert "a.jsonl:3)" in told["the chat template drops the tools"]
    assert "not used: the unknown key `loss` of turns" in told
    assert "not used: the key `train` of turns of the user: only assistant turns are supervised" in told
    assert "not used: the column `images`: only text is trained on" in told
    assert len(told) == 6


@pytest.mark.parametrize(
    "turn, message",
    [
        (SAY | {"content": ""}, r"turn 2 \(assistant\) is empty"),
        (SAY | {"content": None}, r"turn 2 \(assistant\): its content is null, not text"),
        (SAY | {"weight": 0.5}, "turn 2: its weight is 0.5; only 0 and 1"),
        (SAY | {"role": "critic"}, r'turn 2 has the unknown role "critic".*data.roles: {critic: user}'),
        (SAY | {"role": "assitant"}, r"data.roles: {assitant: assistant}"),
        ({"role": "assistant", "tool_calls": "[{"}, "the text of its tool calls is not valid JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "without the name of a function"),
        (calling("f")[1] | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "the arguments of f are a list"),
        (calling("f")[1] | {"tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments of f is not valid JSON"),
    ],
)
def test_broken_turns(write, plain, turn, message):
    with pytest.raises(DataError, match=message):
        load(write("a.jsonl", [{"messages": [ASK, turn]}]), plain)


def test_an_end_that_is_not_a_token_is_told(write, plain):
    """As with a base model's tokenizer and an instruct model's template; the end-of-sequence token still ends the chat."""
    examples = load(write("a.jsonl", [{"messages": [ASK, SAY, ASK, SAY]}]), plain, CALLS.replace(E, "<|stop|>"))
    assert supervised(examples, plain) == ["it goes<|stop|>", "it goes<|stop|>\n</s>"]
    assert examples.report.notes[0].startswith(
        "the chat template ends turns in <|stop|>, which is not a token of this tokenizer (2 times, first in"
    )


def test_a_template_without_calls(write, plain):
    """A turn of calls alone would come out empty: a bad row. Beside content, dropped calls are counted."""
    with pytest.raises(DataError, match=r"turn 2 \(assistant\) is empty: the chat template drops the tool calls"):
        load(write("a.jsonl", [{"messages": calling("add", a=1)}]), plain, NO_CALLS)
    chat = calling("add", a=1)
    chat[1] = chat[1] | {"content": "let me see"}
    report = load(write("b.jsonl", [{"messages": chat}]), plain, NO_CALLS).report
    assert report.notes[0].startswith("the chat template drops the tool calls (1 times, first in")


def test_empty_calls_and_content_parts(write, plain):
    parts = [{"type": "text", "value": "it "}, {"type": "text", "text": "goes", "value": None}]
    row = {"messages": [ASK, SAY | {"tool_calls": [], "function_call": None, "content": parts}]}
    assert supervised(load(write("a.jsonl", [row]), plain), plain) == ["it goes" + E]


def test_roles_of_the_config(write, plain):
    row = {"messages": [{"from": "input", "value": "so"}, {"from": "output", "value": "it goes"}]}
    path = write("a.jsonl", [row])
    with pytest.raises(DataError, match='unknown role "input"'):
        load(path, plain)
    assert supervised(load(path, plain, roles={"input": "user", "output": "assistant"}), plain) == ["it goes" + E]


def test_turns_of_several_columns_and_of_templates():
    """Of a list only the last part is supervised; a history of pairs and a system column come first."""
    row = {"q": "And 2?", "input": "", "a": "It is 2.", "system": "Count.", "history": [["First?", "It was 1."]]}
    parts = ("history", {"user": "{q}"}, {"assistant": "{a}"})
    found = read_conversation(row, parts)
    expected = [("system", "Count."), ("user", "First?"), ("assistant", "It was 1."), ("user", "And 2?")]
    expected.append(("assistant", "It is 2."))
    assert [(turn["role"], turn["content"]) for turn in found.turns] == expected and found.supervised == [4]
    assert len(read_conversation(row | {"history": []}, parts).turns) == 3
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    found = read_conversation({"prompt": [user, assistant, user], "chosen": [assistant]}, ("prompt", "chosen"))
    assert len(found.turns) == 4 and found.supervised == [3]
    with pytest.raises(BadRow, match="last part.*no assistant turn"):
        read_conversation({"prompt": [user, assistant], "chosen": [user]}, ("prompt", "chosen"))
    with pytest.raises(BadRow, match='no column "q"'):
        read_conversation({"history": []}, parts)


def test_a_row_that_asks_needs_no_answer():
    parts = ("history", {"user": "{q}"}, {"assistant": "{a}"})
    row = {"q": "And 2?", "system": "Count."}
    turns, _ = read_prompt(row, asked_messages(row, parts))
    assert [(turn["role"], turn["content"]) for turn in turns] == [("system", "Count."), ("user", "And 2?")]
    inside = ({"user": "{translation[de]}"}, {"assistant": "{translation[en]}"})
    assert asked_messages({"translation": {"de": "x"}}, inside) == inside[:1]
    assert asked_messages({"messages": [1]}, parts) == "messages" and asked_messages({"a": "x"}, parts) is None
