"""What `init` suggests for the shapes of well-known data sets: the prompt has what an answer depends on, and not the answer."""

import json
import subprocess
import sys

import datasets
import pytest

from lora_ft.commands.init.suggest import suggest
from lora_ft.core.errors import ConfigError

T = ("bridge", "mill", "garden", "tower", "forest")


def said(i: int, k: int = 0) -> str:
    return f"the {T[(i * 7 + k) % 5]} and the {T[(i + 3 * k) % 5]} are number {i}"


ALPACA = "Below is an instruction.\n\n### Instruction:\n{0}\n\n### Response:\n{1}"
# row number -> row; settings for a model with a chat template; columns that are told not to be used
SHAPES = {
    "choices in a list": (
        lambda i: (
            {"question": said(i), "choices": {"text": [said(i, k) for k in range(3)], "label": ["A", "B", "C"]}}
            | {"answerKey": "ABC"[i % 3], "id": f"Mercury_{i}"}
        ),
        {
            "prompt": "Question: {question}\nA. {choices[text][0]}\nB. {choices[text][1]}\nC. {choices[text][2]}\nAnswer:",
            "completion": " {answerKey}",
            "label_names": {"answerKey": ["A", "B", "C"]},
        },
        ("id",),
    ),
    "choices in columns, the right one by number": (
        lambda i: {"sentence": said(i), "option1": T[i % 5], "option2": T[(i + 1) % 5], "answer": str(i % 2 + 1)},
        {"prompt": "Sentence: {sentence}\n1. {option1}\n2. {option2}\nAnswer:\n", "completion": "{answer}"},
        (),
    ),
    "a part of the text in a column of its own": (
        lambda i: {"ctx_a": said(i), "ctx": said(i) + " he", "endings": [said(i, 1), said(i, 2)], "label": str(i % 2)},
        {
            "prompt": "Ctx: {ctx}\nA. {endings[0]}\nB. {endings[1]}\nAnswer:",
            "completion": " {label}",
            "label_names": {"label": ["A", "B"]},
        },
        ("ctx_a",),
    ),
    "the example as one text besides": (
        lambda i: {
            "instruction": said(i),
            "input": "",
            "output": said(i, 1),
            "text": ALPACA.format(said(i), said(i, 1)),
        },
        {"messages": [{"user": "{instruction}"}, {"assistant": "{output}"}]},
        ("text",),
    ),
    "a system prompt": (
        lambda i: {"system_prompt": "" if i % 2 else "Be kind.", "question": said(i), "response": said(i, 1)},
        {
            "messages": [
                {"system": "[[{system_prompt}]]"},
                {"user": "{question}"},
                {"assistant": "{response}"},
            ]
        },
        (),
    ),
    "reasoning": (
        lambda i: {"Question": said(i), "Complex_CoT": said(i, 1), "Response": said(i, 2)},
        {"messages": [{"user": "{Question}"}, {"assistant": "{Complex_CoT}\n\n{Response}"}]},
        (),
    ),
    "an explanation of the label": (
        lambda i: {"premise": said(i), "hypothesis": said(i, 1), "label": i % 3, "explanation_1": said(i, 2)},
        {
            "prompt": "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:",
            "completion": " {label}",
            "label_names": {"label": ["A", "B", "C"]},
        },
        ("explanation_1",),
    ),
    "rows without a label": (
        lambda i: {"premise": said(i), "hypothesis": said(i, 1), "label": i % 4 - 1},
        {
            "prompt": "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:",
            "completion": " {label}",
            "label_names": {"label": ["A", "B", "C"]},
            "bad_rows": "skip",
        },
        (),
    ),
    "a number to be predicted": (
        lambda i: {"sentence1": said(i), "sentence2": said(i, 1), "label": i / 7},
        {"prompt": "Sentence1: {sentence1}\nSentence2: {sentence2}\nLabel:\n", "completion": "{label}"},
        (),
    ),
    "many classes": (
        lambda i: {"text": said(i), "label": i % 30},
        {"prompt": "Text: {text}\nLabel:\n", "completion": "{label}"},
        (),
    ),
    "a question, an answer, and a column of few values": (
        lambda i: {"customer_message": said(i), "agent_reply": said(i, 1), "priority": ("low", "high")[i % 2]},
        {"messages": [{"user": "{customer_message}"}, {"assistant": "{agent_reply}"}]},
        ("priority",),
    ),
    "hashes and numbers beside a text": (
        lambda i: {"hexsha": f"{i:040x}", "content": f"def f():\n    return {said(i)!r}", "size": i},
        {"text": "{content}"},
        ("hexsha", "size"),
    ),
    "what was said in turn": (
        lambda i: {"conversations": [said(i), said(i, 1)], "source": "stackexchange"},
        {"messages": "conversations"},
        ("source",),
    ),
    "choices in an object, the answer also in words": (
        lambda i: (
            {
                "question": said(i),
                "answer": T[i % 5],
                "options": dict(zip("AB", (T[i % 5], T[(i + 1) % 5]), strict=True)),
            }
            | {"answer_idx": "AB"[i % 2], "exp": said(i, 2)}
        ),
        {
            "prompt": "Question: {question}\nA. {options[A]}\nB. {options[B]}\nAnswer:",
            "completion": " {answer_idx}",
            "label_names": {"answer_idx": ["A", "B"]},
        },
        ("answer", "exp"),
    ),
    "ten choices, and a question of few values": (
        lambda i: (
            {"premise": said(i), "question": ("cause", "effect")[i // 2 % 2], "options": [*map(str, range(10))]}
            | {"answer": "ABCDEFGHIJ"[i % 10], "answer_index": i % 10}
        ),
        {
            "prompt": "Premise: {premise}\nQuestion: {question}\n"
            + "".join(f"{letter}. {{options[{k}]}}\n" for k, letter in enumerate("ABCDEFGHIJ"))
            + "Answer:",
            "completion": " {answer}",
            "label_names": {"answer": list("ABCDEFGHIJ")},
        },
        ("answer_index",),
    ),
    "two texts of one kind and a few values": (
        lambda i: {"": i, "question1": said(i), "question2": said(i, 1), "is_duplicate": i % 2},
        {
            "prompt": "Question1: {question1}\nQuestion2: {question2}\nIs duplicate:",
            "completion": " {is_duplicate}",
            "label_names": {"is_duplicate": ["A", "B"]},
        },
        (),
    ),
    "answers in spans": (
        lambda i: {
            "passage": said(i),
            "question": said(i, 1),
            "answers_spans": {"spans": [str(i)], "types": ["number"]},
        },
        {"messages": [{"user": "{question}\n\n{passage}"}, {"assistant": "{answers_spans[spans][0]}"}]},
        (),
    ),
    "names with spaces, numbers as text": (
        lambda i: {"Question": said(i), "Correct Answer": said(i, 1), "Price": f"{i}.50"},
        {"messages": [{"user": "{Question}"}, {"assistant": "{Correct Answer}"}]},
        ("Price",),
    ),
    "turns that ask, the answer and the system prompt beside them": (
        lambda i: {"input": [{"role": "user", "content": said(i)}], "output": said(i, 1), "system_prompt": "Be brief."},
        {"messages": [{"system": "[[{system_prompt}]]"}, "input", {"assistant": "{output}"}]},
        (),
    ),
    "lists of labels": (lambda i: {"text": said(i), "labels": [i % 3, 3]}, {"text": "{text}"}, ("labels",)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path, name):
    row, settings, unused = SHAPES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(60)))
    suggestion = suggest(str(path), chat=True)
    assert suggestion.data.settings == settings
    assert suggestion.unused == unused and ("not used" in suggestion.unused_note) == bool(unused)
    if name == "lists of labels":
        assert "Of lists, as labels, make texts first" in suggestion.unused_note


# row number -> row that is refused; what the message says
REFUSED = {
    "pairs of what was said": (
        lambda i: {"source": "x", "conversation": [{"input": said(i), "output": said(i, 1)}] * 2},
        "in input and output",
    ),
    "an object as the answer": (
        lambda i: {"question": said(i), "output": {"a": said(i, 1), "b": i}},
        "output is an object",
    ),
    "an object with values of a few kinds": (
        lambda i: {"email": said(i), "extracted": {"item": "chair", "color": T[i % 2], "count": i % 3}},
        "extracted is an object",
    ),
    "steps in lists": (lambda i: {"title": said(i)[:9], "steps": [said(i, 1)] * 3, "NER": ["x"]}, "most of the text"),
    "answers in lists": (lambda i: {"story": said(i) * 9, "answers": [said(i), "b"]}, "its answers are in answers"),
    "tokens and tags": (lambda i: {"tokens": said(i).split(), "tags": ["O", T[i % 5]]}, "as tokens, tags, make texts"),
    "lists as Python prints them": (lambda i: {"question": said(i), "answer": f"{{'text': ['{i}']}}"}, "to_json"),
    "good and bad answers by number": (
        lambda i: {"prompt": said(i), "response": said(i, 1), "label": i % 2},
        "--task classification",
    ),
    "texts that are all the same": (lambda i: {"method": "POST a request", "n": i}, "do not suit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_no_task_reads_are_refused_and_the_command_in_the_message_rewrites_them(tmp_path, name):
    row, message = REFUSED[name]
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text("".join(json.dumps(row(i)) + "\n" for i in range(20)))
    with pytest.raises(ConfigError, match=message) as e:
        suggest(str(old), chat=True)
    command = str(e.value).partition("python -c '")[2].partition("' <")[0]
    if command:
        with old.open() as source, new.open("w") as target:
            subprocess.run([sys.executable, "-Sc", command], stdin=source, stdout=target, check=True)
        assert suggest(str(new), chat=True).data.settings


def test_names_of_classes_that_datasets_stored(tmp_path):
    names = ["World", "Sports"]
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    rows = datasets.Dataset.from_list([{"text": said(i), "label": i % 2} for i in range(20)], features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    found = suggest(str(tmp_path / "a.parquet")).data
    assert found.settings["label_names"] == {"label": names} and "in the file" in found.notes["label_names"]


def test_the_command_that_makes_chats_of_a_tree(tmp_path):
    def message(name: str, parent: str | None, role: str) -> dict:
        return {"message_id": name, "parent_id": parent, "role": role, "text": f"{role} {name}"}

    tree = [message("a", None, "prompter"), message("b", "a", "assistant"), message("c", "a", "assistant")]
    tree += [message("d", "c", "prompter"), message("e", "d", "assistant"), message("alone", None, "prompter")]
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text("".join(json.dumps(m) + "\n" for m in tree))
    with pytest.raises(ConfigError, match="a chat of every path") as e:
        suggest(str(old))
    command = str(e.value).partition("python -c '")[2].partition("'")[0]
    with old.open() as source, new.open("w") as target:
        subprocess.run([sys.executable, "-c", command], stdin=source, stdout=target, check=True)
    chats = [[turn["content"] for turn in json.loads(line)["messages"]] for line in new.read_text().splitlines()]
    assert chats == [["prompter a", "assistant b"], ["prompter a", "assistant c", "prompter d", "assistant e"]]
    assert suggest(str(new), chat=True).data.settings == {"messages": "messages", "roles": {"prompter": "user"}}
