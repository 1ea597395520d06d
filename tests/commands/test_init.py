"""The config written by `init`: suggested by the data's columns, short, commented, and accepted by `check`."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import yaml

from lora_ft.commands.init.command import create_config
from lora_ft.commands.init.sizes import examine_base, learning_rate_for
from lora_ft.commands.init.suggest import TASKS, name_columns, suggest
from lora_ft.config import docs
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, DataError, FilesError
from lora_ft.data.sniff import suggest_format
from tests.helpers.command import cli, files
from tests.helpers.tiny import write_base

WORDS = ["the", "film", "was", "good", "and", "bad", "and", "great", "but", "awful", "in", "parts"]


def sentence(n: int, length: int = 8) -> str:
    return " ".join(WORDS[(n + k) % len(WORDS)] for k in range(length)) + f" {n}"


def write(path, row, n=40):
    rows = [row(i) for i in range(n)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        import csv

        with path.open("w", newline="") as f:
            table = csv.DictWriter(f, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return str(path)


TURNS = [{"role": "user", "content": "good film?"}, {"role": "assistant", "content": "great"}]
# file name: (row number -> row, task, settings of the data section)
CASES = {
    "words.csv": (
        lambda i: {"review": sentence(i), "sentiment": ("negative", "no", "positive")[i % 3]},
        "classification",
        {"prompt": "Review: {review}\nSentiment:", "completion": " {sentiment}"}
        | {"label_names": {"sentiment": ["negative", "no", "positive"]}},
    ),
    "ids.tsv": (
        lambda i: {"id": i, "text": sentence(i), "label": i % 2},
        "classification",
        {"prompt": "Text: {text}\nLabel:", "completion": " {label}", "label_names": {"label": ["A", "B"]}},
    ),
    "gaps.csv": (
        lambda i: {"text": sentence(i), "label": "" if i == 7 else "yes" if i % 2 else "off"},
        "classification",
        {
            "prompt": "Text: {text}\nLabel:",
            "completion": " {label}",
            "label_names": {"label": ["off", "yes"]},
            "bad_rows": "skip",
        },
    ),
    "named.jsonl": (
        lambda i: {"text": sentence(i), "label": i % 3, "topic": ["sport", "money", "art"][i % 3]},
        "classification",
        {
            "prompt": "Text: {text}\nLabel:",
            "completion": " {label}",
            "label_names": {"label": ["sport", "money", "art"]},
        },
    ),
    "bools.jsonl": (
        lambda i: {"comment": sentence(i), "toxic": i % 3 == 0},
        "classification",
        {"prompt": "Comment: {comment}\nToxic:", "completion": " {toxic}", "label_names": {"toxic": ["false", "true"]}},
    ),
    "stars.csv": (
        lambda i: {"text": sentence(i), "stars": 1 + i % 5},
        "classification",
        {"prompt": "Text: {text}\nStars:\n", "completion": "{stars}"},
    ),
    "alpaca.jsonl": (
        lambda i: {"instruction": sentence(i), "input": "" if i % 2 else sentence(3 * i), "output": sentence(2 * i)},
        "completion",
        {
            "prompt": "### Instruction:\n{instruction}[[\n\n### Input:\n{input}]]\n\n### Response:\n",
            "completion": "{output}",
        },
    ),
    "qa.csv": (
        lambda i: {"Question": sentence(i), "Answer": sentence(2 * i)},
        "completion",
        {"prompt": "Question: {Question}\nAnswer:", "completion": " {Answer}"},
    ),
    "blank.jsonl": (
        lambda i: {"prompt": sentence(i), "completion": " " + sentence(2 * i)},
        "completion",
        {"prompt": "{prompt}", "completion": "{completion}"},
    ),
    "two.jsonl": (
        lambda i: {"english text": sentence(i), "french": sentence(2 * i)},
        "completion",
        {"prompt": "{english text}\n", "completion": "{french}"},
    ),
    "dolly.jsonl": (
        lambda i: (
            {"instruction": sentence(i), "context": "" if i % 2 else sentence(3 * i), "response": sentence(2 * i)}
            | {"category": ["open_qa", "closed_qa"][i % 2]}
        ),
        "completion",
        {
            "prompt": "### Instruction:\n{instruction}[[\n\n### Context:\n{context}]]\n\n### Response:\n",
            "completion": "{response}",
        },
    ),
    "squad.jsonl": (
        lambda i: (
            {"id": str(i), "context": sentence(3 * i), "question": sentence(i)}
            | {"answers": {"text": [sentence(2 * i), "x"], "answer_start": [0, 1]}}
        ),
        "completion",
        {
            "prompt": "Context: {context}\n\nQuestion: {question}\nAnswer:",
            "completion": " {answers[text][0]}",
        },
    ),
    "news.csv": (
        lambda i: {"label": i % 4, "title": sentence(i), "description": sentence(5 * i, 20)},
        "classification",
        {
            "prompt": "Title: {title}\nDescription: {description}\nLabel:",
            "completion": " {label}",
            "label_names": {"label": ["A", "B", "C", "D"]},
        },
    ),
    "choices.jsonl": (
        lambda i: {"question": sentence(i), "options": [sentence(i + k) for k in range(3)], "answer": sentence(2 * i)},
        "completion",
        {
            "prompt": "Options: {options[0]}\n\nOptions: {options[1]}\n\nOptions: {options[2]}\n\n"
            "Question: {question}\nAnswer:",
            "completion": " {answer}",
        },
    ),
    "dpo.jsonl": (
        lambda i: {"prompt": sentence(i), "chosen": sentence(2 * i), "rejected": sentence(3 * i)},
        "completion",
        {"prompt": "{prompt}\n", "completion": "{chosen}"},
    ),
    "dpo_chats.jsonl": (
        lambda i: {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:], "score": 3},
        "chat",
        {"messages": ["prompt", "chosen"]},
    ),
    "dpo_full.jsonl": (
        lambda i: {"prompt": sentence(i), "chosen": TURNS, "rejected": TURNS},
        "chat",
        {"messages": "chosen"},
    ),
    "turns.jsonl": (
        lambda i: {"prompt": TURNS[:1], "completion": TURNS[1:]},
        "chat",
        {"messages": ["prompt", "completion"]},
    ),
    "text_of_chats.csv": (lambda i: {"messages": json.dumps(TURNS)}, "chat", {"messages": "messages"}),
    "oasst.jsonl": (
        lambda i: {"messages": [{"role": "prompter", "content": sentence(i)}, TURNS[1]], "lang": "en"},
        "chat",
        {"messages": "messages", "roles": {"prompter": "user"}},
    ),
    "chat.jsonl": (lambda i: {"id": i, "messages": TURNS}, "chat", {"messages": "messages"}),
    "shared.jsonl": (
        lambda i: {"conversations": [{"from": "human", "value": sentence(i)}, {"from": "gpt", "value": "good"}]},
        "chat",
        {"messages": "conversations"},
    ),
    "book.jsonl": (lambda i: {"text": sentence(i, 200), "page": i}, "text", {"text": "{text}"}),
}


@pytest.mark.parametrize("name", CASES)
def test_columns_suggest_the_task_and_data_settings(tmp_path, name, capsys):
    row, task, form = CASES[name]
    data, path = write(tmp_path / name, row), tmp_path / "config.yaml"
    suggestion = suggest(data)
    assert (suggestion.task, suggestion.data.settings, suggestion.rows) == (task, form, 40)
    create_config(path, "gpt2", data, None, None, False)
    config = load_config(path)
    assert config.data.eval == 0.1 and config.output == "out"
    lines = path.read_text().splitlines()
    assert lines[0] == docs.HEADER + docs.FILE and len(lines) <= 40
    assert (tmp_path / docs.FILE).read_text() == docs.schema_text()
    assert "lora-ft check" in capsys.readouterr().out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("name", ["words.csv", "gaps.csv", "alpaca.jsonl", "book.jsonl"])
def test_the_config_passes_check(tmp_path, base, name, capsys):
    from lora_ft.commands.check.command import check

    path = tmp_path / "config.yaml"
    create_config(path, str(base), write(tmp_path / name, CASES[name][0]), None, None, False)
    check(load_config(path), as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] > 0


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    data = write(tmp_path / "dolly.jsonl", CASES["dolly.jsonl"][0])
    assert suggest(data).unused == ("category",)
    create_config(tmp_path / "c.yaml", "gpt2", data, None, None, False)
    assert "not used: category" in (tmp_path / "c.yaml").read_text() and "not used: category" in capsys.readouterr().out


def test_preferences_are_said_to_be_learned_from_the_chosen_answers_alone(tmp_path, capsys):
    data = write(tmp_path / "dpo.jsonl", CASES["dpo.jsonl"][0])
    create_config(tmp_path / "c.yaml", "gpt2", data, None, None, False)
    assert "preferences: only the chosen answers are learned" in capsys.readouterr().out
    data = write(
        tmp_path / "kto.jsonl", lambda i: {"prompt": sentence(i), "completion": sentence(2 * i), "label": i > 9}
    )
    with pytest.raises(ConfigError, match="`label` .preferences, as for KTO.*Keep the rows whose label is true") as e:
        suggest(data)
    command = str(e.value).partition("python -c '")[2].partition("'")[0]
    with open(data) as old, (tmp_path / "kept.jsonl").open("w") as new:
        subprocess.run([sys.executable, "-c", command], stdin=old, stdout=new, check=True)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept and all(row["label"] for row in kept)
    tree = write(tmp_path / "tree.jsonl", lambda i: {"parent_id": str(i), "role": "prompter", "text": sentence(i)})
    with pytest.raises(ConfigError, match="one message of a tree"):
        suggest(tree)


def test_a_model_with_a_chat_template_gets_chats(tmp_path):
    data = write(tmp_path / "dolly.jsonl", CASES["dolly.jsonl"][0])
    expected = [{"user": "{instruction}[[\n\n{context}]]"}, {"assistant": "{response}"}]
    assert suggest(data, chat=True).data.settings == {"messages": expected}
    row = {"instruction": "And 2?", "output": "It is 2.", "system": "Count.", "history": [["First?", "It was 1."]]}
    data = write(tmp_path / "history.jsonl", lambda i: row | {"history": row["history"] * (i % 2)})
    suggestion = suggest(data, chat=True)
    expected = ["history", {"user": "{instruction}"}, {"assistant": "{output}"}]
    assert suggestion.data.settings == {"messages": expected} and not suggestion.unused
    data = write(tmp_path / "words.csv", CASES["words.csv"][0])
    assert "prompt" in suggest(data, chat=True).data.settings  # labels are compared as completions


@pytest.mark.parametrize(
    "content, format, columns",
    [
        ('prompt;completion\n"a; b";"c"\n', {}, ["prompt", "completion"]),
        ('prompt,completion\n"say \\"hi\\" now","yes"\n', {"escape": "\\"}, ["prompt", "completion"]),
        (b"prompt,completion\n\x93Where\x94,here\n", {"encoding": "cp1252"}, ["prompt", "completion"]),
        ("prompt,completion\nwhere,here\n".encode("utf-16"), {"encoding": "utf-16"}, ["prompt", "completion"]),
        (
            "".join(f"Where is number {i}?,In the town {i}.\n" for i in range(30)),
            {"header": ["prompt", "completion"]},
            ["prompt", "completion"],
        ),
        (
            "".join(f"{sentence(i)},{'good' if i % 2 else 'bad'}\n" for i in range(30)),
            {"header": ["text", "label"]},
            [],
        ),
        ("".join(f"{i % 2},{sentence(i)}\n" for i in range(30)), {"header": ["label", "text"]}, []),
        ("What is your age?,What do you think of it?\n23,it is good\n31,it is bad\n", {}, []),
    ],
)
def test_formats_of_files_are_found_and_written(tmp_path, content, format, columns):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert suggest_format(str(path), name_columns)[0] == format
    create_config(tmp_path / "c.yaml", "gpt2", str(path), None, None, False)
    found = load_config(tmp_path / "c.yaml").data
    assert {k: list(v) if k == "header" else v for k, v in (found.format or {}).items()} == format
    if columns:
        assert (found.prompt, found.completion) == ("{prompt}\n", "{completion}")


def test_max_length_holds_the_longest_example_in_tokens(tmp_path, base):
    """Chinese has three tokens per character in this tokenizer, and the template is counted too."""
    data = write(tmp_path / "a.jsonl", lambda i: {"prompt": "\u4f60" * (i + 1), "completion": "\u597d"})
    create_config(tmp_path / "c.yaml", str(base), data, None, None, False)
    config = load_config(tmp_path / "c.yaml")
    longest = 3 * 40 + 1 + 3 + 1  # prompt, line end, completion, end token
    assert longest <= config.data.max_length == 128
    assert f"the longest of 40 examples has {longest}" in (tmp_path / "c.yaml").read_text()


@pytest.mark.parametrize(
    "layers, width, rate", [(30, 576, "5.0e-4"), (32, 4096, "2.0e-4"), (80, 8192, "1.0e-4"), (None, None, "2.0e-4")]
)
def test_thelearning_rate_for_follows_the_size_of_the_base(tmp_path, base, layers, width, rate):
    folder = base
    if layers:
        folder = tmp_path / "base"
        shutil.copytree(base, folder)
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": 49152}
        config = json.loads((folder / "config.json").read_text()) | sizes
        (folder / "config.json").write_text(json.dumps(config))
    parameters = examine_base(str(folder)).parameters if layers else None
    assert learning_rate_for(parameters)[0] == rate


def test_a_test_set_is_held_out_of_many_rows_and_several_files_are_read(tmp_path):
    one, two = (write(tmp_path / name, CASES["qa.csv"][0], 150) for name in ("a.csv", "b.csv"))
    create_config(tmp_path / "c.yaml", "gpt2", [one, two], None, None, False)
    config = load_config(tmp_path / "c.yaml")
    assert config.data.train == (one, two) and config.data.eval == {"dev": 0.1, "test": 0.1}
    assert config.train.metric_for_best_model == "dev_loss"
    create_config(tmp_path / "d.yaml", "gpt2", one, None, None, False, two)
    assert load_config(tmp_path / "d.yaml").data.eval == (two,)


def test_the_task_option_overrides_the_suggestion(tmp_path):
    data = write(tmp_path / "words.csv", CASES["words.csv"][0])
    assert suggest(data, "text").data.settings == {"text": "{review}"}
    with pytest.raises(ConfigError, match="review, sentiment.*task chat"):
        suggest(data, "chat")


def test_nothing_is_held_out_of_few_rows(tmp_path):
    create_config(
        tmp_path / "c.yaml", "gpt2", write(tmp_path / "book.jsonl", CASES["book.jsonl"][0], 3), None, "mine", False
    )
    config = load_config(tmp_path / "c.yaml")
    assert config.data.eval is None and config.output == "mine"


@pytest.mark.parametrize("text", ["no", "a: b", "12", "ends in space ", "déjà vu #1", "x\ty", '"quoted"', "null"])
def test_any_name_and_word_survives_the_round_trip(tmp_path, text):
    data = write(tmp_path / "l.jsonl", lambda i: {"text": sentence(i), "label": text if i % 2 else "other"})
    create_config(tmp_path / "c.yaml", "gpt2", data, None, text.strip().replace("\t", " "), False)
    config = load_config(tmp_path / "c.yaml")
    assert config.output == text.strip().replace("\t", " ")
    assert text == "12" or set(config.data.label_names["label"]) == {text, "other"}


def test_columns_that_templates_cannot_name(tmp_path):
    data = write(tmp_path / "odd.jsonl", lambda i: {"a.b": sentence(i), "n": i})
    with pytest.raises(ConfigError, match=r"a\.b, n.*docs/config.md"):
        suggest(data)


def test_broken_and_empty_data(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        suggest(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="no rows"):
        suggest(str(tmp_path / "b.csv"))


def test_a_file_is_overwritten_only_with_overwrite(tmp_path):
    data, path = write(tmp_path / "words.csv", CASES["words.csv"][0]), tmp_path / "c.yaml"
    path.write_text("mine")
    with pytest.raises(FilesError, match="--overwrite"):
        create_config(path, "gpt2", data, None, None, False)
    assert path.read_text() == "mine"
    create_config(path, "gpt2", data, None, None, True)
    assert load_config(path)


def test_without_a_terminal_missing_options_are_errors(tmp_path):
    done = cli(tmp_path, "init", "--task", "text")
    assert done.code == 2 and done.err.startswith("--model and --data: missing") and not done.out
    assert cli(tmp_path, "init", "--model", "gpt2").err.startswith("--data: missing")
    done = cli(tmp_path, "init", "--model", "a", "--data", "b.csv", "--task", "chatting")
    assert done.code == 2 and "chat, classification" in done.err
    assert not files(tmp_path)


def test_four_questions_on_a_terminal(tmp_path):
    write(tmp_path / "words.csv", CASES["words.csv"][0])
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lora_ft", "init"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=slave, stderr=slave, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(slave)
        os.write(master, b"gpt2\nwords.csv\n\nmine\n")
        out = process.stdout.read()
        assert process.wait(30) == 0
    os.close(master)
    assert out.startswith("config.yaml: classification, from 40 rows of words.csv\n")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["model"]["name"] == "gpt2" and config["output"] == "mine"
    assert set(TASKS) >= {"classification"}
