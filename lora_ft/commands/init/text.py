"""The YAML text of a suggested config."""

from collections.abc import Sequence
from typing import Any

import yaml

from lora_ft.commands.init.sizes import BaseFacts, sizes
from lora_ft.commands.init.suggest import TASKS, Suggestion
from lora_ft.config import docs
from lora_ft.report import figures

NOTES = {
    "format": "how the file is written",
    "prompt": "columns in braces; not supervised",
    "completion": "supervised, with the end-of-sequence token after it",
    "label_names": "the labels",
    "messages": "the column with the turns; the assistant's are supervised",
    "roles": "a guess: what the roles in the rows are",
    "text": "every token is supervised",
}
COMMENT_COLUMN = 48
TWO_SETS = 200  # rows from which a test set is held out beside the dev set


def config_text(
    model: str,
    sources: Sequence[str],
    suggestion: Suggestion,
    output: str,
    base: BaseFacts,
    evaluation: str | None = None,
) -> str:
    """The YAML of a config for the suggestion: sections in the usual order, comments where a reader has questions."""
    settings, notes, size = suggestion.data.settings, NOTES | suggestion.data.notes, sizes(suggestion, base)
    data = [_line("train", sources[0] if len(sources) == 1 else list(sources)), *_evaluation(suggestion, evaluation)]
    data += [_line(name, value, notes.get(name) or NOTES.get(name, "")) for name, value in settings.items()]
    if note := suggestion.unused_note:
        data.append(f"  # {note}\n")
    data.append(_line("max_length", *size.max_length))
    if suggestion.task == "text":
        data.append(_line("long_text", "split", "longer texts become several examples"))
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
{"".join(data)}
train:
{_line("num_train_epochs", *size.epochs)}{_line("batch_size", *size.batch_size)}\
  {f"learning_rate: {size.learning_rate[0]}":<{COMMENT_COLUMN - 3}} # {size.learning_rate[1]}

output: {yaml_value(output)}
"""


def _evaluation(suggestion: Suggestion, evaluation: str | None) -> list[str]:
    """data.eval: a tenth, two tenths where one chooses the checkpoint and the other judges it, or a file."""
    if suggestion.rows >= TWO_SETS:
        sets = {"dev": 0.1, "test": evaluation or 0.1}
        return [_line("eval", sets, "held out: dev chooses the checkpoint, test judges it" * (evaluation is None))]
    if evaluation:
        return [_line("eval", evaluation)]
    return [_line("eval", 0.1, "a tenth is held out; or name another file")] if suggestion.rows >= 20 else []


def _line(name: str, value: Any, comment: str = "") -> str:
    """The line of a setting in a section, with its line end."""
    text = f"  {name}: {yaml_value(value)}"
    return (f"{text:<{COMMENT_COLUMN - 1}} # {comment}" if comment else text) + "\n"


def yaml_value(value: Any) -> str:
    """A value as YAML on one line; text with line ends, braces or outer spaces is in double quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_value(key)}: {yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and (set("\n\t{}[],") & set(value) or value != value.strip()):
        return yaml.safe_dump(value, default_style='"', width=10**6, allow_unicode=True).strip()
    return figures.yaml_value(value)
