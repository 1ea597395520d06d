"""`lora-ft init`: a short config for a model and a data file, with what was seen in the data written beside each choice."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lora_ft.commands.init.suggest import TASKS, Suggestion, suggest
from lora_ft.config import docs
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, FilesError
from lora_ft.core.messages import format_value
from lora_ft.core.storage import write_file

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOTES = {
    "prompt": "columns in braces; not supervised",
    "completion": "supervised, with the end-of-sequence token after it",
    "label_names": "the labels",
    "messages": "the column of turns; the assistant's are supervised",
    "text": "every token is supervised",
}
LENGTHS = (64, 128, 256, 512, 1024)
COLUMN = 48  # where comments stand


def start(
    path: Path, model: str | None, data: str | None, task: str | None, output: str | None, overwrite: bool
) -> None:
    """Write a config to `path`, asking on a terminal for what isn't given, and the schema for editors beside it.

    Raises:
        ConfigError: no terminal to ask on (what is missing is named), or data that suits no task.
        DataError: the data can't be read. FilesError: the file exists, or can't be written.
    """
    if path.exists() and not overwrite:
        raise FilesError(f"{path}: exists already. Name another file, or add --overwrite.")
    missing = [f"--{name}" for name, value in (("model", model), ("data", data)) if not value]
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if missing and not asks:
        raise ConfigError(f"{' and '.join(missing)}: missing, and there is no terminal to ask on")
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {format_value(task)}: the tasks are {', '.join(TASKS)}")
    asking = bool(missing)
    model = model or _ask("Model: a hub id, a folder or a .gguf file", MODEL)
    data = data or _ask("Data: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id[:config][@split]")
    seen = suggest(data, task)
    if asking and task is None:
        for name, meaning in TASKS.items():
            print(f"  {name:<15} {meaning}", file=sys.stderr)
        chosen = _ask("Task", seen.task, lambda word: word in TASKS)
        seen = seen if chosen == seen.task else suggest(data, chosen)
    output = output or (_ask("Output: the folder that gets the adapter", "out") if asking else "out")
    text = config_text(model, data, seen, output)
    write_file(path, text)
    load_config(path)
    schema = path.parent / docs.FILE
    if not schema.exists() or schema.read_text() != docs.schema_text():
        write_file(schema, docs.schema_text())
    print(f"{path}: {seen.task}, from {seen.rows:,}{' or more' if seen.partial else ''} rows of {data}")
    for name, value in seen.form.settings.items():
        note = seen.form.notes.get(name)
        print(f"  {name}: {yaml_value(value)}" + (f"   ({note})" if note else ""))
    print(f"Next: lora-ft check {path}, then lora-ft train {path}")


def config_text(model: str, data: str, seen: Suggestion, output: str) -> str:
    """The config: sections in the usual order, a comment where a reader would ask."""
    held_out = seen.rows >= 20
    small = seen.rows < 1000 and not seen.partial
    length = next((n for n in LENGTHS if n * 3 >= seen.length), LENGTHS[-1])
    lines = [
        docs.HEADER + docs.FILE,
        f"# {TASKS[seen.task].capitalize()}. `lora-ft schema --markdown` has every setting.",
        "model:",
        _line("name", model),
        "",
        "adapter:",
        _line("rank", 16),
        _line("alpha", 32),
        _line("targets", ["all"], "[q, v] is smaller and faster"),
        "",
        "data:",
        _line("train", data),
    ]
    if held_out:
        lines.append(_line("eval", 0.1, "a tenth is held out; or name another file"))
    for name, value in seen.form.settings.items():
        lines.append(_line(name, value, seen.form.notes.get(name) or NOTES.get(name, "")))
    lines.append(_line("max_length", length, "tokens; a longer example is cut"))
    if seen.task == "text":
        lines.append(_line("long_text", "split", "a longer text becomes several examples"))
    lines += [
        "",
        "train:",
        _line("num_train_epochs", 3 if small else 1),
        _line("batch_size", 8 if small else 16),
        "  learning_rate: 3.0e-4",
    ]
    if held_out and "label_names" in seen.form.settings:
        lines.append(_line("metric_for_best_model", "accuracy"))
    return "\n".join([*lines, "", f"output: {yaml_value(output)}", ""])


def _line(name: str, value: Any, comment: str = "") -> str:
    text = f"  {name}: {yaml_value(value)}"
    return f"{text:<{COLUMN - 1}} # {comment}" if comment else text


def yaml_value(value: Any) -> str:
    """A value on one line, texts with line ends or braces in double quotes."""
    if isinstance(value, str) and ("\n" in value or "{" in value or value != value.strip()):
        return yaml.safe_dump(value, default_style='"', width=10**6, allow_unicode=True).strip()
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _ask(question: str, default: str | None = None, right: Callable[[str], bool] = bool) -> str:
    """An answer from the terminal. Questions go to stderr; stdout is for what was made."""
    while True:
        print(question + (f" [{default}]: " if default else ": "), end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        answer = line.strip() or default or ""
        if line and right(answer):
            return answer
        if not line:
            raise ConfigError(f"\n{question}: no answer")
