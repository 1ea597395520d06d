"""README and CONTRIBUTING: the paths they name exist, and the tour through the code has the length that README states."""

import ast
import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import lora_ft
from lora_ft.cli.app import app
from lora_ft.config.json_schema import entry_at
from lora_ft.config.load import parse_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
GUIDES = sorted(set(DOCUMENTS) - {"CONTRIBUTING.md", "CHANGELOG.md", "docs/faults.md"})  # with code blocks for users
SUFFIXES = "py|md|yaml|json|ipynb|svg|png|toml|txt"
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


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


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
    lines = [line for block in blocks(name, "(?:bash|sh)?") for line in re.sub(r"\\\n", " ", block).splitlines()]
    for line in (line.strip().removeprefix("$ ") for line in lines):
        if not line.startswith("lora-ft ") or line.split()[1].startswith(("--", "is")):
            continue
        words = shlex.split(line, comments=True)
        options = {
            option for parameter in commands[words[1]].params for option in parameter.opts + parameter.secondary_opts
        }
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= options, f"{line}: {used - options}"
        checked += 1
        for setting in (
            after.partition("=")[0] for word, after in itertools.pairwise(words) if word in ("--set", "--vary")
        ):
            assert entry_at(tuple(setting.split("."))), line
    assert checked or name not in ("README.md", "docs/index.md", "docs/using.md")


@pytest.mark.parametrize("name", GUIDES)
def test_python_blocks_compile_and_their_imports_exist(name):
    for block in blocks(name, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "lora_ft":
                assert [a.name for a in node.names if not hasattr(lora_ft, a.name)] == []


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
    """(file, functions, stated lines) of each row of README's tour; no functions: the complete file."""
    text = (ROOT / "README.md").read_text().partition("## Reading the code")[2]
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
    text = (ROOT / "README.md").read_text()
    stated = int(re.search(r"About ([\d,]+) lines lead from the YAML file to the gradient", text)[1].replace(",", ""))
    rows = tour()
    assert len(rows) > 5
    actual = {f"{path.name} {' '.join(functions)}": count_lines(path, functions) for path, functions, _ in rows}
    assert abs(sum(actual.values()) - stated) <= 0.15 * stated, actual
    assert abs(sum(lines for *_, lines in rows) - stated) <= 0.05 * stated
