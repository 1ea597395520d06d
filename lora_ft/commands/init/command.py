"""`lora-ft init`: a short config for a model and a data file, with comments on what was found in the data."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lora_ft.commands.init.suggest import TASKS, Suggestion, suggest
from lora_ft.config import docs
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, FilesError
from lora_ft.core.messages import echo, format_value
from lora_ft.core.storage import write_file
from lora_ft.report import figures

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOTES = {
    "prompt": "columns in braces; not supervised",
    "completion": "supervised, with the end-of-sequence token after it",
    "label_names": "the labels",
    "messages": "the column with the turns; the assistant's are supervised",
    "text": "every token is supervised",
}
LENGTHS = (64, 128, 256, 512, 1024)  # tokens
COMMENT_COLUMN = 48


def create_config(
    path: Path, model: str | None, data: str | None, task: str | None, output: str | None, overwrite: bool
) -> None:
    """Write a config to `path`, and the schema for editors beside it. A missing model or data is asked for on a terminal.

    Raises:
        ConfigError, DataError: as `suggest`; an option is missing and there is no terminal, or the task is unknown.
        FilesError: the file exists, or cannot be written.
    """
    if path.exists() and not overwrite:
        raise FilesError(f"{path}: already exists. Name another file, or add --overwrite.")
    missing = [f"--{name}" for name, value in (("model", model), ("data", data)) if not value]
    if missing and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(f"{' and '.join(missing)}: missing, and there is no terminal to ask for it")
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {format_value(task)}: unknown; the tasks are {', '.join(TASKS)}")
    model = model or _ask("Model: a hub id, a folder or a .gguf file", MODEL)
    data = data or _ask("Data: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id[:config][@split]")
    suggestion = suggest(data, task)
    if missing and task is None:
        for name, meaning in TASKS.items():
            print(f"  {name:<15} {meaning}", file=sys.stderr)
        task = _ask("Task", suggestion.task, lambda word: word in TASKS)
        suggestion = suggestion if task == suggestion.task else suggest(data, task)
    output = output or (_ask("Output: the folder for the adapter", "out") if missing else "out")
    write_file(path, config_text(model, data, suggestion, output))
    load_config(path)
    write_file(path.parent / docs.FILE, docs.schema_text())
    echo(f"{path}: {suggestion.task}, from {suggestion.rows:,}{' or more' * suggestion.partial} rows of {data}")
    for name, value in suggestion.data.settings.items():
        note = suggestion.data.notes.get(name)
        echo(f"  {name}: {yaml_value(value)}" + (f"   ({note})" if note else ""))
    echo(f"Next: lora-ft check {path}, then lora-ft train {path}")


def config_text(model: str, data: str, suggestion: Suggestion, output: str) -> str:
    """The YAML of a config for the suggestion: sections in the usual order, comments where a reader has questions."""
    hold_out = suggestion.rows >= 20
    small = suggestion.rows < 1000 and not suggestion.partial
    length = next((n for n in LENGTHS if n * 3 >= suggestion.length), LENGTHS[-1])  # 3 characters per token or more
    settings, notes = suggestion.data.settings, NOTES | suggestion.data.notes
    data_lines = [_line("train", data)]
    if hold_out:
        data_lines.append(_line("eval", 0.1, "a tenth is held out; or name another file"))
    data_lines += [_line(name, value, notes.get(name, "")) for name, value in settings.items()]
    data_lines.append(_line("max_length", length, "tokens; longer examples are truncated"))
    if suggestion.task == "text":
        data_lines.append(_line("long_text", "split", "longer texts become several examples"))
    best = _line("metric_for_best_model", "accuracy") if hold_out and "label_names" in settings else ""
    return f"""\
{docs.HEADER}{docs.FILE}
# {TASKS[suggestion.task].capitalize()}. `lora-ft schema --markdown` lists every setting.
model:
{_line("name", model)}
adapter:
  rank: 16
  alpha: 32
{_line("targets", ["all"], "[q, v] is smaller and faster")}
data:
{"".join(data_lines)}
train:
  num_train_epochs: {3 if small else 1}
  batch_size: {8 if small else 16}
  learning_rate: 3.0e-4
{best}
output: {yaml_value(output)}
"""


def _line(name: str, value: Any, comment: str = "") -> str:
    """The line of a setting in a section, with its line end."""
    text = f"  {name}: {yaml_value(value)}"
    return (f"{text:<{COMMENT_COLUMN - 1}} # {comment}" if comment else text) + "\n"


def yaml_value(value: Any) -> str:
    """A value as YAML on one line; text with line ends, braces or outer spaces is in double quotes."""
    if isinstance(value, str) and ("\n" in value or "{" in value or value != value.strip()):
        return yaml.safe_dump(value, default_style='"', width=10**6, allow_unicode=True).strip()
    return figures.yaml_value(value)


def _ask(question: str, default: str | None = None, valid: Callable[[str], bool] = bool) -> str:
    """A valid reply from the terminal. Prompts go to stderr; stdout is for results."""
    while True:
        print(question + (f" [{default}]: " if default else ": "), end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise ConfigError(f"\n{question}: no reply")
        reply = line.strip() or default or ""
        if valid(reply):
            return reply
