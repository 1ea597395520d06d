"""`lora-ft generate` and `eval` of several adapters: two runs of different kinds on one tiny base, against PEFT."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_ft.commands.evaluate import evaluate_command
from lora_ft.commands.generate import serving
from lora_ft.commands.generate.command import generate_command
from lora_ft.commands.generate.prompts import PromptFormat, read_prompts
from lora_ft.commands.merge import merge_command
from lora_ft.commands.train import train
from lora_ft.config.load import load_config, parse_config
from lora_ft.core.errors import ConfigError, DataError, ModelError
from lora_ft.core.trust import Trust
from lora_ft.data.template import Template
from lora_ft.data.tokens import text_encoder
from tests.data.conftest import build as build_tokenizer
from tests.helpers.tiny import CONFIG, write_base, write_run

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHAT = """
model: {name: base}
adapter: {rank: 2, alpha: 4, targets: [all]}
data: {train: chats.jsonl, messages: messages, chat_template: chat.jinja}
train: {batch_size: 8, num_train_epochs: 4, learning_rate: 3.0e-2, report_to: []}
output: talk
"""
REVIEWS = CONFIG.replace("alpha: 8", "alpha: 8, targets: [all]").replace("epochs: 2", "epochs: 4") + "output: reviews\n"
GOOD, BAD = "the film is a good movie", "the film is a bad movie"


def chat_of(question: str) -> list[dict]:
    answer = "great" if "good" in question else "awful"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with base/, reviews/ (a prompt with one column) and talk/ (chats)."""
    folder = write_run(tmp_path_factory.mktemp("runs"), config=REVIEWS)
    reviews = [{"text": BAD, "label": 0}, {"text": GOOD, "label": 1}] * 24
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    chats = [{"messages": chat_of(f"is it a {w} movie")} for w in ("good", "bad")] * 24
    (folder / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (folder / "chat.yaml").write_text(CHAT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for config in ("config.yaml", "chat.yaml"):
            train(load_config(config))
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


BOTH = dict(adapters=["reviews=reviews", "talk=talk"])


def test_rows_fill_a_template_that_reads_inside_columns():
    tokenizer = build_tokenizer()
    template = Template("{q}: {options[text][0]}", " {a}")
    prompts = PromptFormat(template, None, False, text_encoder(tokenizer))
    row = {"q": "which", "options": {"text": ["this", "that"]}}
    assert prompts.takes(row, {}) and prompts.from_row(row)[0] == "which: this"
    assert not prompts.takes({"q": "which"}, {})


def generate(capsys, *folders, **options) -> str:
    capsys.readouterr()
    generate_command(list(map(Path, folders)), **options)
    return capsys.readouterr().out


def rows(capsys, *folders, **options) -> list[dict]:
    return [json.loads(line) for line in generate(capsys, *folders, as_json=True, **options).splitlines()]


def by_peft(adapter: str | None, prompt: str, new: int = 12) -> str:
    """The greedy answer of PEFT's model to a whole prompt, alone, without a cache."""
    tokenizer = AutoTokenizer.from_pretrained("base")
    model = AutoModelForCausalLM.from_pretrained("base")
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            max_new_tokens=new,
            do_sample=False,
            use_cache=False,
            generation_config=GenerationConfig(eos_token_id=2, pad_token_id=0),
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def reviewed(text: str) -> str:
    return f"Review: {text}\nSentiment:"


def said(*texts: str) -> str:
    turns = [f"<s>{'assistant' if i % 2 else 'user'}: {text}</s>" for i, text in enumerate(texts)]
    return "".join(turns) + "<s>assistant: "


# ---- prompts ----


def test_a_file_of_prompts_is_read_as_the_runs_data_is(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("q;a\nWo ist Köln?;Am Rhein\n".encode("cp1252"))
    data = {"train": str(path), "text": "{q}", "format": {"encoding": "cp1252"}}
    (row,) = read_prompts(str(path), parse_config({"model": {"name": "base"}, "data": data}))
    assert row.columns == {"q": "Wo ist Köln?", "a": "Am Rhein"}
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_prompts(str(path), None))


def test_a_text_fills_the_runs_template_and_the_answer_ends(here, capsys):
    assert generate(capsys, "reviews", prompt=GOOD) == "positive\n"
    (row,) = rows(capsys, "reviews", prompt=BAD)
    assert row == {
        "where": "--prompt",
        "adapter": "reviews",
        "prompt": reviewed(BAD),
        "answer": " negative",
        "tokens": row["tokens"],
        "ended": True,
    }
    assert row["tokens"] < 20 and by_peft("reviews", reviewed(BAD)) == " negative"


def test_raw_leaves_the_text_unchanged(here, capsys):
    (row,) = rows(capsys, "reviews", prompt=GOOD, raw=True, max_new_tokens=12)
    assert row["prompt"] == GOOD and row["answer"] == by_peft("reviews", GOOD)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_file_whose_rows_name_adapters(here, capsys, batch_size):
    asked = [
        ({"text": GOOD}, "reviews", reviewed(GOOD)),
        ({"prompt": "is it a bad movie", "adapter": "talk"}, "talk", said("is it a bad movie")),
        ({"prompt": BAD, "adapter": "base"}, None, BAD),
        ({"messages": chat_of("is it a good movie"), "adapter": "talk"}, "talk", said("is it a good movie")),
        ({"text": BAD, "label": 0, "adapter": "reviews"}, "reviews", reviewed(BAD)),
        ({"prompt": GOOD, "adapter": None}, None, GOOD),
    ]
    Path("p.jsonl").write_text("".join(json.dumps(columns) + "\n" for columns, _, _ in asked))
    found = rows(capsys, prompts="p.jsonl", max_new_tokens=12, batch_size=batch_size, **BOTH)
    assert [(r["where"], r["adapter"], r["prompt"]) for r in found] == [
        (f"p.jsonl:{i}", adapter or "base", prompt) for i, (_, adapter, prompt) in enumerate(asked, 1)
    ]
    assert [r["answer"] for r in found] == [by_peft(adapter, prompt) for _, adapter, prompt in asked]
    assert [found[i]["answer"].strip() for i in (0, 1, 3, 4)] == ["positive", "awful", "great", "negative"]


def test_text_files_and_plain_output(here, capsys):
    Path("p.txt").write_text(f"{GOOD}\n\n{BAD}\n")
    assert generate(capsys, "reviews", prompts="p.txt") == (
        "--- p.txt:1 (reviews)\npositive\n--- p.txt:3 (reviews)\nnegative\n"
    )


def test_the_bare_base_and_a_checkpoint(here, capsys):
    (row,) = rows(capsys, base="base", prompt=GOOD, max_new_tokens=12)
    assert row["answer"] == by_peft(None, GOOD) and row["adapter"] == "base"
    assert rows(capsys, "base", prompt=GOOD, max_new_tokens=12) == [row]
    (row,) = rows(capsys, "talk/checkpoints/step-24", prompt="is it a good movie")
    assert (row["adapter"], row["answer"].strip()) == ("step-24", "great")


def test_a_merged_model_in_the_home_folder_keeps_the_template_of_its_run(here, tmp_path, monkeypatch, capsys):
    merge_command(Path("reviews"), output=tmp_path / "merged", verify=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (row,) = rows(capsys, base="~/merged", prompt=GOOD)
    assert row["prompt"] == reviewed(GOOD) and row["answer"] == " positive"


@pytest.mark.parametrize("ids", [{}, {"pad_token_id": 99_999, "eos_token_id": -1}])
def test_padding_and_end_ids_that_are_none_or_in_no_vocabulary(tmp_path, capsys, ids):
    base = write_base(tmp_path / "base", "gpt2" if not ids else "llama")
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        for key in ("pad_token", "pad_token_id"):
            settings.pop(key, None)
        (base / name).write_text(json.dumps(settings | (ids if name != "tokenizer_config.json" else {})))
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    (tmp_path / "p.txt").write_text(f"{GOOD}\n{GOOD} and it is a bad film\n")
    one, two = rows(capsys, base=str(base), prompts=str(tmp_path / "p.txt"), max_new_tokens=5)
    (alone,) = rows(capsys, base=str(base), prompt=GOOD, max_new_tokens=5)
    assert one["answer"] == alone["answer"] and two["tokens"] <= 5


def test_sampling_follows_the_model_unless_overridden(here, capsys):
    def answers(**options) -> list[str]:
        Path("p.txt").write_text(f"{GOOD}\n" * 8)
        return [row["answer"] for row in rows(capsys, base="base", prompts="p.txt", max_new_tokens=8, **options)]

    assert len(set(answers())) == 1  # its own config: greedy
    sampled = answers(temperature=1.5, seed=1)
    assert len(set(sampled)) > 1 and sampled == answers(temperature=1.5, seed=1) != answers(temperature=1.5, seed=2)
    path = Path("base/generation_config.json")
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"do_sample": True, "temperature": 1.5}))
        assert answers(seed=1) == sampled
        assert len(set(answers(greedy=True))) == 1
    finally:
        path.write_text(before)


# ---- errors ----


@pytest.mark.parametrize(
    "line, error, message",
    [
        ('{"prompt": "x", "adapter": "talkk"}', ModelError, "p.jsonl:2: no adapter talkk; .* Did you mean talk?"),
        ('{"prompt": "x", "adapter": 3}', DataError, "p.jsonl:2: its adapter is not a name"),
        (
            '{"txt": "x"}',
            DataError,
            'p.jsonl:2: a row needs "prompt" or "messages", or the template\'s text; this one has txt',
        ),
        ('{"text": null}', DataError, 'p.jsonl:2: column "text" is null'),
        ('{"prompt": "x"', DataError, "p.jsonl:2: broken JSON"),
        ('{"prompt": "", "adapter": "base"}', DataError, "p.jsonl:2: the prompt is empty"),
        ('{"messages": "hi", "adapter": "talk"}', DataError, "p.jsonl:2: its messages are text"),
        ('{"prompt": "' + "film " * 200 + '"}', DataError, "p.jsonl:2: the prompt's .* tokens .* 128 positions"),
    ],
)
def test_a_malformed_row_is_reported_with_its_line(here, capsys, line, error, message):
    Path("p.jsonl").write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(error, match=message):
        generate(capsys, prompts="p.jsonl", **BOTH)


@pytest.mark.parametrize(
    "folders, options, error, message",
    [
        ([], dict(adapters=["reviews"]), ConfigError, "NAME=DIR"),
        ([], dict(adapters=["a=reviews", "a=talk"]), ConfigError, "two adapters named a"),
        ([], dict(adapters=["base=reviews"]), ConfigError, "reviews: an adapter named base, as the bare base is"),
        (["base"], dict(adapters=["a=reviews"]), ConfigError, "a complete model, not an adapter"),
        (["nowhere"], {}, ModelError, "nowhere: no such folder"),
        ([], {}, ModelError, "out: no such folder"),
        (["reviews"], dict(prompts="none.jsonl"), DataError, "none.jsonl: no such file"),
        (["reviews"], dict(prompts="none.txt"), DataError, "none.txt: can't be read"),
        (["reviews"], dict(prompt="x", prompts="p.txt"), ConfigError, "--prompt and --prompts"),
        (["reviews"], dict(as_json=True), ConfigError, "--json needs --prompt or --prompts"),
        (["reviews"], dict(prompt="x", greedy=True, top_p=0.5), ConfigError, "--greedy and --top-p"),
    ],
)
def test_invalid_options(here, capsys, folders, options, error, message):
    with pytest.raises(error, match=message):
        generate(capsys, *folders, **options)


def test_an_adapter_of_another_base_is_refused(here, tmp_path, capsys):
    other = write_base(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match="^base .*fingerprint"):
        generate(capsys, adapters=["talk=talk"], base=str(other), prompt="x")
    assert generate(capsys, adapters=["talk=talk"], base=str(other), prompt="x", trust=Trust(other_base=True))


# ---- chat ----


def chat(capsys, monkeypatch, lines: list[str], *folders, **options) -> tuple[list[str], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    generate_command(list(map(Path, folders)), max_new_tokens=12, **options)
    said = capsys.readouterr()
    return said.out.splitlines(), said.err


def test_a_chat_from_a_pipe(here, capsys, monkeypatch):
    asked = [GOOD, "/adapter talk", "is it a good movie", "/both", "is it a bad movie", "/base", "hm", "", "/adapter"]
    asked += ["/adapter talkk", "/bth", "/help", "/quit", "never"]
    out, err = chat(capsys, monkeypatch, asked, **BOTH)
    turns = said("is it a good movie", "great", "is it a bad movie")
    base, talk = by_peft(None, turns).strip(), by_peft("talk", turns).strip()
    assert "\n".join(out) == "\n".join(
        ["positive", "great", f"base: {base}", f"talk: {talk}", by_peft(None, "hm").lstrip()]
    )
    assert "reviews: each line fills the run's template 'Review: {text}\\nSentiment:', by itself" in err
    assert "talk: a chat through the chat template" in err and "* base" in err
    assert "no adapter talkk; loaded are reviews, talk. Did you mean talk?" in err
    assert "Unknown command /bth. Did you mean /both?" in err and "/reset" in err


def test_reset_forgets_and_a_long_message_is_refused(here, capsys, monkeypatch):
    out, err = chat(capsys, monkeypatch, ["is it a good movie", "/reset", "is it a bad movie", "film " * 200], "talk")
    assert out == ["great", by_peft("talk", said("is it a bad movie")).strip()] and "128 positions" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(here, capsys, monkeypatch):
    real, calls = serving.Served.answer, []

    def answer(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(serving.Served, "answer", answer)
    out, err = chat(capsys, monkeypatch, ["is it a bad movie", "is it a good movie"], "talk")
    assert out == ["", "great"] and "Stopped. The chat continues without this message and its answer." in err
    assert calls[1][1][0].text == said("is it a good movie")  # as if the first had not been asked


def test_a_template_with_columns_needs_rows(here, capsys):
    shutil.copytree("reviews", "titled", dirs_exist_ok=True)
    record = json.loads(Path("titled/lora_ft.json").read_text())
    record["config"]["data"]["prompt"] = "{title}: {text}"
    Path("titled/lora_ft.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"--prompt: the run's template takes the columns title, text, .*--raw"):
        generate(capsys, "titled", prompt="x")
    Path("p.jsonl").write_text('{"title": "t", "text": "x"}\n')
    assert rows(capsys, "titled", prompts="p.jsonl", max_new_tokens=2)[0]["prompt"] == "t: x"


@pytest.fixture
def tasks(here):
    """The run reviews as if of Alpaca's columns: `text`, and `input` that may be empty."""
    shutil.copytree("reviews", "tasks", dirs_exist_ok=True)
    record = json.loads(Path("tasks/lora_ft.json").read_text())
    record["config"]["data"]["prompt"] = "Review: {text}[[\nInput: {input}]]\nSentiment:"
    Path("tasks/lora_ft.json").write_text(json.dumps(record))
    return "tasks"


def test_a_prompt_fills_the_main_column_and_columns_the_others(tasks, capsys):
    def prompt(**options) -> str:
        return rows(capsys, tasks, max_new_tokens=2, **options)[0]["prompt"]

    assert prompt(prompt=GOOD) == reviewed(GOOD)
    assert prompt(prompt=GOOD, columns=["input=a=b\\nc"]) == f"Review: {GOOD}\nInput: a=b\nc\nSentiment:"
    assert prompt(prompt="x", columns=[f"text={GOOD}"]) == f"Review: {GOOD}\nInput: x\nSentiment:"
    with pytest.raises(ConfigError, match="--column inptu=x: the templates have text, input. Did you mean input?"):
        prompt(prompt=GOOD, columns=["inptu=x"])
    asked = [{"text": GOOD, "input": None}, {"text": GOOD, "adapter": "base"}, {"prompt": GOOD, "input": "x"}]
    Path("p.jsonl").write_text("".join(json.dumps(columns) + "\n" for columns in asked))
    found = rows(capsys, tasks, prompts="p.jsonl", max_new_tokens=12)
    assert [row["prompt"] for row in found] == [reviewed(GOOD)] * 3
    assert found[1]["adapter"] == "base" and found[1]["answer"] == by_peft(None, reviewed(GOOD))


def test_a_chat_sets_columns_and_takes_several_lines(tasks, capsys, monkeypatch):
    lines = [GOOD, "/set", "/set input=x", GOOD, '"""', "one", "", "/two", '"""', "/set none=x", "/set input=", GOOD]
    asked, real = [], serving.Served.answer
    monkeypatch.setattr(serving.Served, "answer", lambda *a: asked.append(a[1][0].text) or real(*a))
    _, err = chat(capsys, monkeypatch, lines, tasks)
    assert asked == [
        reviewed(GOOD),
        reviewed(f"{GOOD}\nInput: x"),
        reviewed("one\n\n/two\nInput: x"),
        reviewed(GOOD),
    ]
    assert "tasks: each line fills text of the run's template" in err and "/set input=TEXT" in err
    assert "text=''\ninput=''" in err and "/set none=x: the templates have text, input." in err


def test_several_adapters_answer_one_prompt(here, capsys):
    assert generate(capsys, prompt=GOOD, max_new_tokens=12, **BOTH) == (
        f"--- reviews\npositive\n--- talk\n{by_peft('talk', said(GOOD)).strip()}\n"
    )
    assert [row["adapter"] for row in rows(capsys, prompt=GOOD, max_new_tokens=2, **BOTH)] == ["reviews", "talk"]


def test_folders_of_one_name_go_by_their_paths(here, tmp_path, capsys):
    shutil.copytree("reviews", tmp_path / "reviews")
    shutil.copytree("reviews", tmp_path / "base")
    folders = ["reviews", str(tmp_path / "reviews"), str(tmp_path / "base")]
    assert [row["adapter"] for row in rows(capsys, *folders, prompt=GOOD, max_new_tokens=2)] == folders


def test_generated_text_is_safe_for_a_terminal():
    from lora_ft.commands.generate.chat import escape

    assert escape("a\n\x1b[2Jb\tc") == "a\n\\x1b[2Jb\tc"


def test_a_chat_in_a_terminal(here):
    """Typed into a terminal of its own: a prompt, a growing answer, side by side in columns, Ctrl-C."""
    command = [sys.executable, "-m", "lora_ft", "generate", "talk", "--max-new-tokens", "12"]
    pid, leader = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, os.environ | {"COLUMNS": "60", "TERM": "xterm", "NO_COLOR": "1"})
    screen = ""

    def until(text: str, seconds: float = 150) -> None:
        nonlocal screen
        end = time.monotonic() + seconds
        while text not in screen:
            assert time.monotonic() < end, screen
            if select.select([leader], [], [], 0.2)[0]:
                screen += os.read(leader, 4096).decode(errors="replace")

    def type_in(text: str) -> None:
        nonlocal screen
        screen = ""
        os.write(leader, text.encode())

    try:
        until("talk> ")
        type_in("is it a good movie\n")
        until("great")
        until("talk> ")
        type_in("\x1b[200~is it a\ngood movie\x1b[201~\n")  # a terminal's bracketed paste
        until("great")
        until("talk> ")
        assert screen.count("talk> ") == 1, screen  # one message
        type_in("/both\n")
        until("base | talk> ")
        type_in("is it a bad movie\n")
        until("base | talk> ")
        assert re.search("┃.*base.*┃.*talk.*┃", screen) and "│" in screen
        time.sleep(0.5)  # the line editor, just before it waits for a key, could miss it
        type_in("\x03")
        until("stopped")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(leader)


# ---- eval of several ----


def test_eval_of_several_is_eval_of_each(here, capsys):
    def scores(*folders, **options) -> dict:
        capsys.readouterr()
        evaluate_command(list(map(Path, folders)), as_json=True, **options)
        return json.loads(capsys.readouterr().out)

    together = scores("reviews", "talk", "reviews/checkpoints/step-24")
    one = scores("reviews")
    assert together["examples"] == one["examples"] and together["base"] == one["base"]
    assert list(together["adapters"]) == ["reviews", "talk", "reviews/checkpoints/step-24"]
    assert together["adapters"]["reviews"] == one["adapter"] != together["adapters"]["talk"]
    assert together["adapters"]["talk"] == scores("talk", config_path=Path("config.yaml"))["adapter"]


def test_eval_of_several_as_a_table_with_notes(here, capsys):
    evaluate_command([Path("reviews"), Path("talk")])
    said = capsys.readouterr()
    rows = [line.split("│")[1].strip() for line in said.out.splitlines() if line.startswith("│")]
    assert rows[:3] == ["base", "reviews", "talk"] and max(map(len, said.out.splitlines())) <= 80
    assert "note: talk was trained with another data.prompt, data.completion, data.messages" in said.err
    with pytest.raises(ConfigError, match="base: a complete model"):
        evaluate_command([Path("reviews"), Path("base")])
    with pytest.raises(ConfigError, match="named twice"):
        evaluate_command([Path("reviews"), Path("reviews")])
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        evaluate_command([Path("reviews"), Path("nowhere")])
