"""Help with examples, shell completion, the schema, and the report of the machine."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lora_ft.cli.app import app
from lora_ft.commands import env
from lora_ft.config.docs import reference, schema_text

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lora_ft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | variables)


def test_every_command_has_an_example_that_fits_a_terminal():
    assert {"schema", "env", "init", "export"} <= set(COMMANDS)
    for command in app.registered_commands:
        name, text = command.name or command.callback.__name__, command.callback.__doc__
        assert f"Example: lora-ft {name}" in text, name
        assert all(len(line.strip()) <= 78 for line in text.splitlines()), name


def examples() -> list[list[str]]:
    """The words of every example in the help, as a shell splits them."""
    found = []
    for command in app.registered_commands:
        _, _, text = (command.callback.__doc__ or "").replace("\\\n", " ").partition("Example:")
        found += [shlex.split(line.partition("lora-ft ")[2]) for line in text.splitlines() if "lora-ft " in line]
    return found


def test_examples_are_those_of_a_fresh_clone():
    """Their options exist, and their files: of the repository, of `make assets`, or of the examples before."""
    made = {"config.yaml": "init", "reviews=out": "train"}
    made |= dict.fromkeys(["lora-ft.schema.json", "env.txt"], "schema")
    made |= dict.fromkeys(["out/a=0.7", "out/b=0.3", "out/a=1", "out/b=-0.5", "out/both", "out/less"], "combine")
    group = typer.main.get_command(app)
    for name, *words in examples():
        command = words[: words.index(">")] if ">" in words else words
        context = group.commands[name].make_context(name, list(command))  # exits for an option that does not exist
        assert not context.args
        for word in words:
            if "/" in word and not word.startswith(("data/", "models/")):
                assert word in made or (ROOT / word).is_file(), word
    assert len(examples()) >= len(app.registered_commands)


def test_summaries_fit_their_line_of_the_help():
    assert "..." not in run("--help").stdout.partition("Commands:")[2]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    script = run(_LORA_FT_COMPLETE=f"source_{shell}")
    assert script.returncode == 0 and f"complete_{shell}" in script.stdout and "lora-ft" in script.stdout
    request = {"COMP_WORDS": "lora-ft sche", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "lora-ft sche"}
    request |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = run(_LORA_FT_COMPLETE=f"complete_{shell}", **request)
    assert "schema" in done.stdout and "train" not in done.stdout


def test_completion_knows_the_settings():
    request = {"COMP_WORDS": "lora-ft train c.yaml --set adapter.r", "COMP_CWORD": "4"}
    completed = run(_LORA_FT_COMPLETE="complete_bash", **request).stdout.split()
    assert completed == [f"adapter.{name}=" for name in ("rank", "rank_pattern", "rslora")]


def test_schema_prints_the_generated_files():
    assert run("schema").stdout == schema_text()
    assert run("schema", "--markdown").stdout == reference()


def test_env_prints_versions_and_no_secret_or_path(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/home/someone/private")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    facts = env.environment()
    assert {"lora-ft", "python", "torch", "transformers", "peft", "device", "memory"} <= facts.keys()
    assert facts["HF_TOKEN"] == facts["HF_HOME"] == "set" and facts["OMP_NUM_THREADS"] == "1"
    text = env.report()
    assert "hf_secret" not in text and "private" not in text and json.dumps(facts)


def test_env_reports_a_torch_that_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "can't be imported" in env.environment()["device"]
