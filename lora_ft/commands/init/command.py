"""`lora-ft init`: a short config for a model and data, with comments on what was found in the data."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lora_ft.commands.init.sizes import MODEL_TEMPLATE_HINT, BaseFacts, examine_base
from lora_ft.commands.init.suggest import TASKS, Suggestion, name_columns, suggest
from lora_ft.commands.init.text import config_text, yaml_value
from lora_ft.config import docs
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, DataError, FilesError
from lora_ft.core.messages import echo, format_value, info, warn
from lora_ft.core.storage import write_file
from lora_ft.core.terminal import doing, is_terminal
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.sniff import suggest_format
from lora_ft.data.sources import iter_rows

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def create_config(
    path: Path,
    model: str | None,
    data: str | Sequence[str] | None,
    task: str | None,
    output: str | None,
    overwrite: bool,
    evaluation: str | None = None,
    trust: Trust = NO_TRUST,
) -> None:
    """Write a config to `path`, and the schema for editors beside it. A missing model or data is asked for on a terminal.

    Raises:
        ConfigError, DataError: as `suggest`; an option is missing and there is no terminal, or the task is unknown.
        FilesError: the file exists, or cannot be written.
    """
    if path.exists() and not overwrite:
        raise FilesError(f"{path}: already exists. Name another file, or add --overwrite.")
    missing = [f"--{name}" for name, value in (("model", model), ("data", data)) if not value]
    terminal = sys.stdin.isatty() and is_terminal(sys.stderr)
    if missing and not terminal:
        raise ConfigError(f"{' and '.join(missing)}: missing, and there is no terminal to ask for it")
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {format_value(task)}: unknown; the tasks are {', '.join(TASKS)}")
    model = model or _ask("Model: a hub id, a folder or a .gguf file", MODEL)
    data = data or _ask_data()
    sources = [data] if isinstance(data, str) else list(data)
    if evaluation:
        next(iter_rows(evaluation), None)
    base = examine_base(model, trust)
    if base.problem:
        warn(f"{base.problem} init guesses the lengths.")
    format, note = suggest_format(sources[0], name_columns)
    suggestion = suggest(sources, task, base.has_chat_template, format)
    if missing and task is None:
        for name, meaning in TASKS.items():
            print(f"  {name:<15} {meaning}", file=sys.stderr)
        while (task := _ask("Task", suggestion.task)) != suggestion.task:
            if task in TASKS:
                try:
                    suggestion = suggest(sources, task, base.has_chat_template, format)
                except ConfigError as e:
                    info(str(e))
    if missing:
        suggestion = _ask_label_names(suggestion)
    output = output or (_ask("Output: the folder for the adapter", "out") if missing else "out")
    if format:
        settings, notes = {"format": format} | suggestion.data.settings, {"format": note} | suggestion.data.notes
        suggestion = replace(suggestion, data=replace(suggestion.data, settings=settings, notes=notes))
    write_file(path, config_text(model, sources, suggestion, output, base, evaluation))
    load_config(path)
    write_file(path.parent / docs.FILE, docs.schema_text())
    _report(path, sources, suggestion, base)


def _report(path: Path, sources: Sequence[str], suggestion: Suggestion, base: BaseFacts) -> None:
    more = " or more" * suggestion.partial
    echo(f"{path}: {suggestion.task}, from {suggestion.rows:,}{more} rows of {', '.join(sources)}")
    for name, value in suggestion.data.settings.items():
        note = suggestion.data.notes.get(name)
        echo(f"  {name}: {yaml_value(value)}" + (f"   ({note})" if note else ""))
    if unused := suggestion.unused_note:
        echo(f"  {unused}")
    if "messages" in suggestion.data.settings and base.tokenizer is not None and not base.has_chat_template:
        warn(MODEL_TEMPLATE_HINT)
    echo(f"Next: lora-ft check {path}, then lora-ft train {path}")


def _ask_data() -> str:
    """A data source that can be read; another is asked for until it can."""
    while True:
        source = _ask("Data: a .jsonl, .json, .csv, .tsv or .parquet file, a folder, or a hub id[:config][@split]")
        try:
            list(islice(iter_rows(source), 1))
            return source
        except (DataError, ConfigError) as e:
            if "not UTF-8" in str(e) or "data.format" in str(e):
                return source  # init finds its format
            info(str(e))


def _ask_label_names(suggestion: Suggestion) -> Suggestion:
    """The suggestion with names for class ids that the user gives, if the data has none."""
    settings = suggestion.data.settings
    if "label_names" not in settings or "replace by" not in suggestion.data.notes.get("label_names", ""):
        return suggestion
    ((column, words),) = settings["label_names"].items()
    while True:
        reply = _ask(f"Names of the {len(words)} classes of {column}, in the order of the ids", ", ".join(words))
        names = [name.strip() for name in reply.split(",")]
        if len(set(names)) == len(words) and all(names):
            data = replace(suggestion.data, settings=settings | {"label_names": {column: names}}, notes={})
            return replace(suggestion, data=data)


def _ask(question: str, default: str | None = None) -> str:
    """A reply from the terminal. Prompts go to stderr; stdout is for results."""
    while True:
        with doing(None):
            print(question + (f" [{default}]: " if default else ": "), end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        if not line:
            raise ConfigError(f"\n{question}: no reply")
        if reply := line.strip() or default or "":
            return reply
