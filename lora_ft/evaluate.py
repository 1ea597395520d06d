"""`lora-ft eval`: an adapter beside its base, or a whole model, on eval data."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_ft import run_folder
from lora_ft.adapter.files import CONFIG
from lora_ft.adapter.fit import check_base, check_tokenizer
from lora_ft.attention import Packing
from lora_ft.base import resolve
from lora_ft.config import Config, load_config, parse_config
from lora_ft.data.examples import largest_id
from lora_ft.data.prepare import evaluation_set
from lora_ft.device import micro_batch_tokens, prepare_device
from lora_ft.errors import ConfigError, ModelError
from lora_ft.methods.verbs import load, read_by
from lora_ft.model import check_vocabulary, load_base, load_tokenizer
from lora_ft.names import printable
from lora_ft.record import read_record
from lora_ft.scoring import score
from lora_ft.storage import read_json


def evaluate_command(
    folder: Path,
    *,
    config_path: Path | None = None,
    data: str | None = None,
    base: str | None = None,
    as_json: bool = False,
    overrides: Sequence[str] = (),
    other_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Print the scores of `folder`: a table, or with `as_json` an object.

    Raises:
        UserError: nothing trained there, no eval data, or the wrong base.
    """
    is_adapter, unfinished = run_folder.has_adapter(folder), run_folder.unfinished(folder)
    if unfinished or (not is_adapter and not (folder / "config.json").is_file()):
        raise ModelError(
            unfinished
            or f"{folder}: nothing trained there. Train first, `lora-ft train CONFIG`, or name a folder: `lora-ft eval FOLDER`."
        )
    if base and not is_adapter:
        raise ConfigError(
            f"--base: {folder} is a whole model, not an adapter, and is scored as it is. Leave --base out."
        )
    record = read_record(folder) or {}
    recorded = record.get("base") or {}
    model_name = base if is_adapter else str(folder)
    if not model_name and not config_path:
        model_name = recorded.get("name") or read_json(folder / CONFIG, ModelError).get("base_model_name_or_path")
    config = settings(folder, record, config_path, data, model_name, overrides)

    device = prepare_device(config)
    pinned = recorded.get("revision") if config.model.name == recorded.get("name") else config.model.revision
    files = resolve(config.model.name, pinned, allow_pickle)
    tokenizer = load_tokenizer(files, trust_remote_code)
    if is_adapter:
        check_base(record, files, other_base)
        check_tokenizer(record, files, tokenizer, other_base)
    examples = evaluation_set(config.data, tokenizer, config.train.seed)
    print(f"eval: {examples.report.summary()}", file=sys.stderr)
    model = load_base(files, config.model.dtype, trust_remote_code, device)
    check_vocabulary(model, files, largest_id(examples))
    bare = load(model, folder) if is_adapter else nullcontext
    read = read_by(model, examples)
    packing = Packing.of(model, read.report.longest)
    at_most = micro_batch_tokens(config, device)
    scores = {}
    if is_adapter:
        with bare():
            scores["base"] = score(model, examples.dataset, packing, at_most).metrics()
    whole = not (folder / CONFIG).is_file()
    scores["model" if whole else "adapter"] = score(model, read.dataset, packing, at_most).metrics()
    if as_json:
        print(json.dumps({"examples": len(examples.dataset), **scores}))
    else:
        show(len(examples.dataset), scores, examples.label_words)


def settings(
    folder: Path, record: dict, config_path: Path | None, data: str | None, model: str | None, overrides: Sequence[str]
) -> Config:
    """The config to score with: the file's, else the record's, with the command line's model and data."""
    changes = [f"model.name={model}"] if model else []
    if data:  # all of it, unless the command line says otherwise
        changes += [f"data.eval={json.dumps(data, ensure_ascii=False)}", "data.max_eval_examples=null"]
    changes += overrides
    if config_path:
        return load_config(config_path, changes)
    if "config" in record:
        return parse_config(record["config"], changes)
    if not (model and data):
        raise ConfigError(
            f"{folder}: has no {run_folder.RECORD}, so it doesn't say which model and data it was made for. "
            "Add --config FILE, or --base NAME and --data SOURCE with a template: --set data.prompt=... "
            "--set data.completion=..."
        )
    return parse_config({"model": {"name": model}, "data": {"train": data}}, changes, "the command line")


def show(examples: int, scores: dict[str, dict], words: list[str]) -> None:
    """A table for people, on stdout."""
    console = Console(highlight=False)
    table = Table(title=f"{examples} examples")
    table.add_column("")
    for who in scores:
        table.add_column(who, justify="right")
    some = next(iter(scores.values()))
    for name in ("loss", "perplexity", "accuracy", "macro_f1"):
        if name in some:
            cells = []
            for metrics in scores.values():
                low, high = metrics["accuracy_ci95"] if name == "accuracy" else (None, None)
                interval = f" ({low:.1%} to {high:.1%})" if low is not None else ""
                cells.append((f"{metrics[name]:.1%}" if name == "accuracy" else f"{metrics[name]:.4f}") + interval)
            table.add_row({"macro_f1": "macro-F1"}.get(name, name), *cells)
    console.print(table)
    for who, metrics in scores.items():
        if "confusion" in metrics:
            console.print(confusion_table(who, metrics["confusion"], words))


def confusion_table(who: str, confusion: list[list[int]], words: list[str]) -> Table:
    table = Table(title=f"{who}: true label by row, answer by column")
    table.add_column("")
    for word in words:
        table.add_column(Text(printable(word)), justify="right")
    for word, row in zip(words, confusion, strict=True):
        table.add_row(Text(printable(word)), *map(str, row))
    return table
