"""Rows 10 to 15, 38 and 40 of the fault matrix: the data. In depth in the tests of data/."""

import json

import pytest

from tests.helpers.command import cli, refused, refused_untouched, train, training

GOOD = b'{"text": "a good film", "label": 1}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # 10: nothing there
        (b"", ["train.jsonl"]),
        (b"\n \n\n", ["train.jsonl"]),
        # 11: broken lines
        (GOOD + b'{"text": \n', ["train.jsonl:2", "JSON"]),
        (GOOD + b"[1, 2]\n", ["train.jsonl:2", "object"]),
        (GOOD + b"[" * 100_000, ["train.jsonl:2"]),
        # 12: columns
        (GOOD + b'{"text": "a"}\n', ["train.jsonl:2", "label"]),
        (GOOD + b'{"text": null, "label": 0}\n', ["train.jsonl:2", "text", "null"]),
        (GOOD + b'{"text": ["a"], "label": 0}\n', ["train.jsonl:2", "text", "a list"]),
        (GOOD + b'{"text": {"b": 1}, "label": 0}\n', ["train.jsonl:2", "text"]),
        # 13: bytes that aren't UTF-8
        (GOOD + b'{"text": "\xff", "label": 0}\n', ["train.jsonl:2", "byte", "UTF-8"]),
        # 14: a class without a word
        (GOOD + b'{"text": "a", "label": 2}\n', ["train.jsonl:2", "class 2", "negative, positive"]),
        (GOOD + b'{"text": "a", "label": -1}\n', ["train.jsonl:2", "class -1"]),
        # 38: escape codes
        (GOOD + b'{"text": "a", "label": "\\u001b[31mred"}\n', ["train.jsonl:2", "\\x1b[31mred"]),
        (GOOD + b'{"text": "a", "\\u001b[2Jlabel": 1}\n', ["train.jsonl:2", "label"]),
    ],
)
@pytest.mark.parametrize("which", ["train.jsonl", "eval.jsonl"])
def test_data(fresh, which, content, words):
    (fresh / which).write_bytes(content)
    refused_untouched(fresh, 3, *(word.replace("train.jsonl", which) for word in words))
    assert "\x1b" not in (fresh / "stderr.txt").read_text()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", b"text,label\na,0\nb,7\n", ["rows.csv:3", "class 7"]),
        ("rows.csv", b"text,label\n", ["rows.csv"]),
        ("rows.csv", b'text,label\n"a,0\n', ["rows.csv"]),
        ("rows.json", b'[{"text": "a", "label": 0},\n {"text": "b"', ["rows.json:2", "JSON"]),
        ("rows.json", b'{"rows": 1}', ["rows.json"]),
        ("rows.parquet", b"PAR1 and not more", ["rows.parquet", "Parquet"]),
        ("rows.txt", b"a", ["rows.txt"]),
    ],
)
def test_other_kinds_of_files(fresh, name, content, words):
    (fresh / name).write_bytes(content)
    refused_untouched(fresh, 3, *words, command=training(f"data.train={name}"))


def test_bad_rows_are_skipped_and_counted_when_asked(fresh):
    with (fresh / "train.jsonl").open("a") as f:
        f.write('{"text": null, "label": 0}\n{"text": "a", "label": 9}\n{"text": "a", "label": "\\u001b[31mred"}\n')
    ended = train(fresh, "data.bad_rows=skip", "train.max_steps=1")
    assert ended.code == 0, ended
    for word in ("3 bad rows skipped", "train.jsonl:49", "null", "train.jsonl:50", "class 9", "train.jsonl:51"):
        assert word in ended.err
    assert "\x1b" not in ended.err
    data = json.loads((fresh / "out/lora_ft.json").read_text())["data"]["train"]
    assert (data["rows"], data["used"], data["skipped_count"]) == (51, 48, 3)


def test_a_byte_order_mark_is_fine(fresh):
    data = (fresh / "train.jsonl").read_bytes()
    (fresh / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + data)
    assert train(fresh, "train.max_steps=1").code == 0


def test_long_rows_are_cut_and_counted(fresh):
    checked = cli(fresh, "check", "config.yaml", "--json", "--set", "data.max_length=12")
    facts = json.loads(checked.out)["train"]
    assert facts["truncated"] > 0 and facts["used"] == 48 and facts["longest"] <= 12 and facts["dropped"] == 0
    ended = train(fresh, "data.max_length=12", "train.max_steps=1")
    assert ended.code == 0 and f"{facts['truncated']} truncated" in ended.err


CHAT = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


@pytest.fixture
def chat(fresh):
    """A run on chats; the first answer begins late."""
    (fresh / "config.yaml").write_text(
        "model: {name: base}\ndata: {train: train.jsonl, messages: messages, chat_template: chat.jinja}\n"
        "train: {max_steps: 1, report_to: []}\n"
    )
    (fresh / "chat.jinja").write_text(CHAT)
    write_chats(fresh, ["that was it " * 20, "a good movie"])
    return fresh


def write_chats(folder, questions: list[str]) -> None:
    chats = ([{"role": "user", "content": q}, {"role": "assistant", "content": "good"}] for q in questions)
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))


def test_rows_of_which_truncation_leaves_nothing_supervised(chat):
    ended = train(chat, "data.max_length=20", "data.truncate=end")
    assert ended.code == 0 and "1 dropped" in ended.err, ended
    write_chats(chat, ["that was it " * 20])
    other = training("data.max_length=20", "data.truncate=end", "output=other")
    refused_untouched(chat, 3, "train.jsonl", "data.max_length", command=other)


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("{{ raise_exception('no such role') }}", None, ["no such role"]),
        ("{{ messages[0].content + None }}", None, ["chat template"]),
        ("{{ raise_exception('\x1b[31mred') }}", None, ["\\x1b[31mred"]),
        (CHAT, [{"role": "user", "content": "hi"}], []),
        (CHAT, [{"role": "assistant"}], []),
        (CHAT, "hi", ["messages"]),
        (CHAT, [], ["messages"]),
    ],
)
def test_chats_that_cannot_be_rendered(chat, template, row, words):
    (chat / "chat.jinja").write_text(template)
    good = (chat / "train.jsonl").read_text().splitlines()[1] + "\n"
    (chat / "train.jsonl").write_text((json.dumps({"messages": row}) + "\n" if row is not None else "") + good)
    refused_untouched(chat, 3, "train.jsonl:1", "bad_rows: skip", *words)
    if row is not None:
        ended = train(chat, "data.bad_rows=skip")
        assert ended.code == 0 and "1 bad rows skipped" in ended.err, ended


def test_a_template_that_is_none(chat):
    (chat / "chat.jinja").write_text("{% for m in %}")
    refused_untouched(chat, 2, "data.chat_template", "line 1")
    (chat / "chat.jinja").unlink()
    refused_untouched(chat, 2, "data.chat_template", "chat.jinja")


def test_escape_codes_are_shown_escaped(fresh):
    (fresh / "train.jsonl").write_text(json.dumps({"text": "\x1b[31mred\x07 \x9b", "label": 1}) + "\n")
    checked = cli(fresh, "check", "config.yaml")
    assert checked.code == 0 and "\\x1b[31mred\\x07" in checked.out, checked
    assert not {"\x1b", "\x07", "\x9b"} & set(checked.out + checked.err)
    named = 'data.label_names={label: [negative, "po\\eX"]}'
    assert "\x1b" not in cli(fresh, "check", "config.yaml", "--set", named).out
    refused(train(fresh, "data.train=\x1b[31m.jsonl"), 2, "\\x1b")
    refused(train(fresh, 'data.train="\\e[31m.jsonl"'), 2, "\\x1b[31m.jsonl")
    refused(train(fresh, "model.name=./\x1b[31m"), 2, "\\x1b[31m")
