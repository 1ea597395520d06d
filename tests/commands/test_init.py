"""The config written by `init`: suggested by the data's columns, short, commented, and accepted by `check`."""

import json
import os
import pty
import subprocess
import sys

import pytest
import yaml

from lora_ft.commands.init.command import create_config
from lora_ft.commands.init.suggest import TASKS, suggest
from lora_ft.config import docs
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, DataError, FilesError
from tests.helpers.tiny import lora_ft, write_base

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
        {"prompt": "Text: {text}\nLabel:", "completion": " {label}", "label_names": {"label": ["0", "1"]}},
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
        {"prompt": "Text: {text}\nStars:", "completion": " {stars}"},
    ),
    "alpaca.jsonl": (
        lambda i: {"instruction": sentence(i), "input": "" if i % 2 else sentence(3 * i), "output": sentence(2 * i)},
        "completion",
        {
            "prompt": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
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
    done = lora_ft("init", "--task", "text", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("--model and --data: missing") and not done.stdout
    assert lora_ft("init", "--model", "gpt2", cwd=tmp_path).stderr.startswith("--data: missing")
    done = lora_ft("init", "--model", "a", "--data", "b.csv", "--task", "chatting", cwd=tmp_path)
    assert done.returncode == 2 and "chat, classification" in done.stderr
    assert not list(tmp_path.iterdir())


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
