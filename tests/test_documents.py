"""The documents: links and paths lead somewhere, every block runs or says why not, the tour has the length it states.

A block is not run if the line before it is `<!-- not run: REASON -->`; its commands and options are checked nevertheless.
Blocks without a language are shell commands; output is marked as text.
"""

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM

from lora_ft.cli.app import app
from lora_ft.config.json_schema import entry_at
from lora_ft.config.load import parse_config
from tests.helpers.command import cli
from tests.helpers.tiny import CONFIG, write_run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
GUIDES = sorted(set(DOCUMENTS) - {"CONTRIBUTING.md", "CHANGELOG.md", "docs/faults.md"})  # with code blocks for users
TOUR = ROOT / "CONTRIBUTING.md"
SUFFIXES = "py|md|yaml|json|ipynb|svg|png|toml|txt"
RUN = sorted(set(GUIDES) - {"docs/claims.md"})  # generated, each of its blocks takes hours
# Folders that a path in code font may be relative to, besides the repository.
PARENTS = ["", "lora_ft", "tests"]
# Files that a command writes. NAME in a path stands for a file that the reader creates.
WRITTEN = {"config.yaml", "adapter_config.json", "samples.json", "lora_ft.json", "compare.json", "config.json"}


def links(text: str) -> set[str]:
    """The targets of relative Markdown links."""
    return {t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", t)}


def paths_in_code(text: str) -> set[str]:
    """Words in code font that name a file with a folder, such as `nn/lora.py` or `configs/*.yaml`."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return {word for span in spans for word in re.findall(rf"(?<![\w/.])[\w.-]+/[\w./*-]*\.(?:{SUFFIXES})\b", span)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name):
    document = ROOT / name
    assert [t for t in links(document.read_text()) if not (document.parent / t).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_headings_lead_to_headings(name):
    def anchors(document: Path) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    document = ROOT / name
    targets = [t.partition("#") for t in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", document.read_text()) if "://" not in t]
    assert [t for t in targets if t[2] not in anchors(document.parent / t[0] if t[0] else document)] == []


def blocks(name: str, language: str, marked: bool = True) -> list[str]:
    """The blocks of a language; marked: with those that are marked as not run."""
    text = (ROOT / name).read_text()
    found = re.finditer(r"^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block[3] for block in found if block[2] == language and (marked or not block[1])]


def shell_lines(name: str, marked: bool = True) -> list[str]:
    """The lines of the shell blocks, each with those that continue it."""
    return [line for block in blocks(name, "", marked) for line in re.sub(r"\\\n", " ", block).splitlines() if line]


def words(line: str) -> list[str]:
    """The words of a command, without a comment and what its output is written to."""
    return list(itertools.takewhile(lambda word: word != ">", shlex.split(line, comments=True)))


def examples() -> list[str]:
    """The examples in the help of every command, and in that of all."""
    texts = [command.callback.__doc__.partition("Example:")[2] for command in app.registered_commands]
    lines = [line for text in texts for line in re.sub(r"\\\n", " ", text).splitlines()]
    general = [re.split(r"  +", line.strip())[0] for line in app.registered_callback.callback.__doc__.splitlines()]
    return [line.strip() for line in [*lines, *general] if line.strip().startswith("lora-ft ")]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A folder as readers have it: data, a config, a run in out, others below it. A tiny base goes by the names of models."""
    folder = write_run(tmp_path_factory.mktemp("reader"), config=CONFIG.replace("name: base", "name: gpt2"))
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "models/smollm2-135m-instruct"):
        shutil.copytree(folder / "base", folder / name)
    (folder / "data").mkdir()
    for name in ("train", "eval"):
        shutil.copy(folder / f"{name}.jsonl", folder / f"data/reviews_{name}.jsonl")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in rows[:2]))
    shutil.copy(folder / "eval.jsonl", folder / "reviews-test.jsonl")
    ended = cli(folder, "train", "config.yaml", "--set", "train.max_steps=2")
    assert ended.code == 0, ended.err
    for name in ("a", "b", "quickstart", "reviews", "jokes", "rank8", "rank16"):
        shutil.copytree(folder / "out", folder / "out-copy" / name)
    shutil.copytree(folder / "out-copy", folder / "out", dirs_exist_ok=True)
    return folder


def test_every_block_runs_or_says_why_not():
    """A block of another language, or a shell line of another program, would be run by no test."""
    for name in RUN:
        assert set(re.findall(r"^```(\S+)", (ROOT / name).read_text(), re.MULTILINE)) <= {"yaml", "python", "text"}, (
            name
        )
        assert [line for line in shell_lines(name, marked=False) if not line.startswith("lora-ft ")] == [], name


def test_commands_in_blocks_and_help_run(reader, tmp_path):
    """Each as typed, in a folder of its own; not `compare`, which trains many adapters, nor `serve`, which does not end."""
    lines = [line for name in RUN for line in shell_lines(name, marked=False)] + examples()
    commands = dict.fromkeys(tuple(words(line)[1:]) for line in lines)
    assert len(commands) > 20
    failed = []
    for i, command in enumerate(command for command in commands if command[0] not in ("compare", "serve")):
        folder = tmp_path / str(i)
        shutil.copytree(reader, folder)
        if command[0] == "init":
            (folder / "config.yaml").unlink()
        if command[0] == "train":
            shutil.rmtree(folder / "out")
            command += ("--set", "train.max_steps=1")
        if "--texts" in command:
            command += ("--set", "generation.max_new_tokens=8")  # the tiny base has 128 positions
        typed = ["gpt2" if word == "gpt3-175b" else word for word in command]
        ended = cli(folder, *typed, before=lambda: setattr(sys, "stdin", io.StringIO()))
        if ended.code:
            failed.append((command, ended.err))
        shutil.rmtree(folder)
    assert failed == []


@pytest.mark.parametrize("name", [name for name in RUN if blocks(name, "python", marked=False)])
def test_python_blocks_run(reader, name, monkeypatch):
    """With the names that a block takes as given: a model, and a batch of three rows."""
    monkeypatch.chdir(reader)
    for block in blocks(name, "python", marked=False):
        batch = {"input_ids": torch.tensor([[5, 14, 15]] * 3), "attention_mask": torch.ones(3, 3, dtype=torch.long)}
        given = {"model": AutoModelForCausalLM.from_pretrained("gpt2"), "batch_of_three": batch}
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(block, name, "exec"), given)


@pytest.mark.parametrize("name", GUIDES)
def test_yaml_blocks_are_settings(name):
    """Each is a part of a config: with what it lacks, it is one."""
    for block in blocks(name, "yaml"):
        config = yaml.safe_load(block)
        config = {"model": {"name": "m"}} | config
        config["data"] = {"train": "t.jsonl"} | config.get("data", {})
        if not {"prompt", "text", "messages"} & config["data"].keys():
            config["data"] |= {"prompt": "{a}", "completion": "{b}", "label_names": {"b": ["no", "yes"]}}
        parse_config(config)


@pytest.mark.parametrize("name", GUIDES)
def test_commands_in_blocks_exist(name):
    """Every command and option of a `lora-ft` line, and every setting that --set names."""
    commands, checked = typer.main.get_command(app).commands, 0
    for line in shell_lines(name):
        if not line.startswith("lora-ft "):
            continue
        typed = words(line)
        options = {
            option for parameter in commands[typed[1]].params for option in parameter.opts + parameter.secondary_opts
        }
        used = {word.partition("=")[0] for word in typed[2:] if word.startswith("--")}
        assert used <= options, f"{line}: {used - options}"
        checked += 1
        for setting in (
            after.partition("=")[0] for word, after in itertools.pairwise(typed) if word in ("--set", "--vary")
        ):
            assert entry_at(tuple(setting.split("."))), line
    assert checked or name not in ("README.md", "docs/index.md", "docs/using.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_in_code_font_exist(name):
    paths = paths_in_code((ROOT / name).read_text())
    missing = [p for p in paths if not any(list((ROOT / parent).glob(p)) for parent in PARENTS)]
    assert [p for p in missing if Path(p).name not in WRITTEN and "NAME" not in p] == []


def test_names_in_contributing_exist():
    spans = re.findall(r"`([A-Za-z_]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    names = {name for name in spans if "_" in name or name.isupper() or name != name.lower()}
    sources = "".join(path.read_text() for folder in ("lora_ft", "tests") for path in (ROOT / folder).rglob("*.py"))
    assert len(names) > 20
    assert [name for name in sorted(names - {"NAME"}) if not re.search(rf"\b{name}\b", sources)] == []


def tour() -> list[tuple[Path, list[str], int]]:
    """(file, functions, stated lines) of each row of the tour; no functions: the complete file."""
    text = TOUR.read_text().partition("## Reading the code")[2]
    rows = re.findall(r"^\| \[`[^`]+`\]\(([^)]+)\)(?:: ([^|]+))? \| (\d+) \|", text, re.MULTILINE)
    return [(ROOT / path, re.findall(r"`(\w+)`", functions), int(lines)) for path, functions, lines in rows]


def count_lines(path: Path, functions: list[str]) -> int:
    """The lines of a file, or of these functions in it."""
    text = path.read_text()
    if not functions:
        return len(text.splitlines())
    nodes = {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    return sum(nodes[name].end_lineno - nodes[name].lineno + 1 for name in functions)


def test_the_tour_has_the_stated_length():
    text = TOUR.read_text()
    stated = int(re.search(r"About ([\d,]+) lines lead from the YAML file to the gradient", text)[1].replace(",", ""))
    rows = tour()
    assert len(rows) > 5
    actual = {f"{path.name} {' '.join(functions)}": count_lines(path, functions) for path, functions, _ in rows}
    assert abs(sum(actual.values()) - stated) <= 0.15 * stated, actual
    assert abs(sum(lines for *_, lines in rows) - stated) <= 0.05 * stated
