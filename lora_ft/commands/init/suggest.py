"""Guess from the columns of a data file how to train on it: as chats, classification, prompts and completions, or text."""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_ft.core.errors import ConfigError, DataError
from lora_ft.core.messages import printable
from lora_ft.core.names import template_columns
from lora_ft.data.sources import iter_rows
from lora_ft.data.template import Columns

TASKS = {
    "chat": "turns of a chat; the model learns the assistant's",
    "classification": "a text gets one of a few labels",
    "completion": "a prompt, and the completion that follows it",
    "text": "plain text: a style, a domain or a language",
}
MAX_ROWS = 20_000  # read from the source
MAX_CLASSES = 20
TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "document", "message", "title")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "target", "rating", "stars")
ALPACA = "### Instruction:\n{%s}\n\n### Input:\n{%s}\n\n### Response:\n"
# common pairs of columns: (prompt columns, all required; completion columns, of which one; prompt; completion)
PAIRS = (
    (("instruction", "input"), ("output", "response"), ALPACA, "{%s}"),
    (("instruction",), ("output", "response", "completion"), "### Instruction:\n{%s}\n\n### Response:\n", "{%s}"),
    (("context", "question"), ("answer",), "{%s}\n\nQuestion: {%s}\nAnswer:", " {%s}"),
    (("question",), ("answer", "response", "output"), "Question: {%s}\nAnswer:", " {%s}"),
    (("prompt",), ("completion", "response", "output", "answer"), "{%s}\n", "{%s}"),
    (("query",), ("response", "answer", "output"), "{%s}\n", "{%s}"),
    (("source",), ("target",), "{%s}\n", "{%s}"),
    (("input",), ("output", "target"), "{%s}\n", "{%s}"),
    (("article",), ("highlights", "summary"), "{%s}\n\nSummary:", " {%s}"),
    (("document",), ("summary",), "{%s}\n\nSummary:", " {%s}"),
    (("text",), ("summary",), "{%s}\n\nSummary:", " {%s}"),
)


@dataclass(frozen=True)
class DataSettings:
    """Settings of a config's data section, and by setting a note for the reader of the config."""

    settings: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)

    @cached_property
    def columns(self) -> set[str]:
        """The columns that the settings read."""
        templates = [self.settings[name] for name in ("prompt", "completion", "text") if name in self.settings]
        return {name for template in templates for name in template_columns(template)} or {self.settings["messages"]}


@dataclass(frozen=True)
class Suggestion:
    """A task of TASKS with its settings. rows: examined; partial: there are more. length: an example's characters (95%)."""

    task: str
    data: DataSettings
    rows: int
    partial: bool
    length: int


def suggest(source: str, task: str | None = None) -> Suggestion:
    """Examine the first rows of `source` and suggest how to train on them, for `task` or else for the task they suggest.

    Raises:
        DataError: no such file, a malformed row, or no rows.
        ConfigError: the columns do not suit the task, or any task.
    """
    source_rows = list(itertools.islice(iter_rows(source), MAX_ROWS + 1))
    if bad := next((row for row in source_rows if row.problem), None):
        raise DataError(f"{bad.where}: {bad.problem}.")
    rows = [row.columns for row in source_rows[:MAX_ROWS]]
    if not rows:
        raise DataError(f"{printable(source)}: no rows.")
    for name, detect in DETECTORS:
        if task in (None, name) and (data := detect(rows)) is not None:
            return Suggestion(name, _skip_gaps(rows, data), len(rows), len(source_rows) > MAX_ROWS, _length(rows, data))
    goal = f"the task {task} ({TASKS[task]})" if task else f"any of the tasks {', '.join(TASKS)}"
    raise ConfigError(
        f"{printable(source)}: its columns ({printable(', '.join(_columns(rows)), 400)}) do not suit {goal}. Choose another "
        "--task, or write data.prompt, text or messages by hand: docs/config.md."
    )


def _detect_chat(rows: list[Columns]) -> DataSettings | None:
    chats = [name for name in _columns(rows) if all(_is_chat(row.get(name)) for row in rows[:100])]
    return DataSettings({"messages": _pick(chats, ("messages", "conversations", "conversation"))}) if chats else None


def _is_chat(value: Any) -> bool:
    keys, turns = ({"role", "content"}, {"from", "value"}), value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(t, dict) and any(k <= t.keys() for k in keys) for t in turns)


def _detect_known_pair(rows: list[Columns]) -> DataSettings | None:
    by_lower = {name.lower(): name for name in _template_columns(rows)}
    for prompt_names, completion_names, prompt, completion in PAIRS:
        answer = next(filter(None, map(by_lower.get, completion_names)), None)
        if answer and all(name in by_lower for name in prompt_names) and not _is_label(rows, answer):
            columns = tuple(by_lower[name] for name in prompt_names)
            return DataSettings(_pair(rows, prompt % columns, completion % answer, answer))
    return None


def _detect_classification(rows: list[Columns]) -> DataSettings | None:
    labels = [name for name in _template_columns(rows) if _is_label(rows, name)]
    labels = [name for name in labels if name.lower() in LABEL_NAMES] or labels
    texts = [name for name in _text_columns(rows) if name not in labels]
    if not labels or not texts:
        return None
    label, text = _pick(labels, LABEL_NAMES), _pick(texts, TEXT_NAMES)
    text_title, label_title = (name.replace("_", " ").strip().capitalize() for name in (text, label))
    settings = _pair(rows, f"{text_title}: {{{text}}}\n{label_title}:", f" {{{label}}}", label)
    words, note = _class_words(rows, label)
    if not words:
        return DataSettings(settings, {"completion": note})
    return DataSettings(settings | {"label_names": {label: words}}, {"label_names": note})


def _detect_two_texts(rows: list[Columns]) -> DataSettings | None:
    texts = _text_columns(rows)
    if len(texts) != 2:
        return None
    pair = _pair(rows, f"{{{texts[0]}}}\n", f"{{{texts[1]}}}", texts[1])
    return DataSettings(pair, {"completion": "guessed from the order of the columns"})


def _detect_text(rows: list[Columns]) -> DataSettings | None:
    texts = _text_columns(rows)
    return DataSettings({"text": f"{{{_pick(texts, TEXT_NAMES)}}}"}) if texts else None


DETECTORS = (
    ("chat", _detect_chat),
    ("completion", _detect_known_pair),
    ("classification", _detect_classification),
    ("completion", _detect_two_texts),
    ("text", _detect_text),
)


def _columns(rows: list[Columns]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _template_columns(rows: list[Columns]) -> list[str]:
    """The columns that a template can name."""

    def fits(name: str) -> bool:
        try:
            return template_columns(f"{{{name}}}") == (name,)
        except ValueError:
            return False

    return [name for name in _columns(rows) if fits(name)]


def _text_columns(rows: list[Columns]) -> list[str]:
    """The columns with texts of 20 characters on average, in order; if there are none, those with any text."""
    columns = {name: _values(rows, name) for name in _template_columns(rows)}
    texts = {name: values for name, values in columns.items() if values and all(isinstance(v, str) for v in values)}
    words = [name for name, values in texts.items() if not all(v.strip().isdecimal() for v in values)]
    long = [name for name in words if sum(map(len, texts[name])) >= 20 * len(texts[name]) and len(set(texts[name])) > 1]
    return long or words


def _values(rows: list[Columns], name: str) -> list[Any]:
    """The values of a column, without gaps."""
    return [value for row in rows if (value := row.get(name)) is not None and value != ""]


def _is_label(rows: list[Columns], name: str) -> bool:
    """Whether a column has few distinct short values, five rows each on average (two if the column is named like a label)."""
    values = _values(rows, name)
    if not values or not all(isinstance(v, str | int) or isinstance(v, float) and v.is_integer() for v in values):
        return False
    classes = set(values)
    short = all(len(str(v)) <= 40 and "\n" not in str(v) for v in classes)
    per_class = 2 if name.lower() in LABEL_NAMES else 5
    return short and 2 <= len(classes) <= min(MAX_CLASSES, len(values) // per_class)


def _class_words(rows: list[Columns], label: str) -> tuple[list[str], str]:
    """The words of the classes by id, and a note on them; [] if the values cannot be ids or words of `label_names`."""
    values = set(_values(rows, label))
    if all(isinstance(v, bool) for v in values):
        return ["false", "true"], "replace by what false and true mean, in this order"
    if any(isinstance(v, str) and not v.isdecimal() for v in values):
        words = sorted(map(str, values))
        if any(word.strip().isdecimal() for word in words):
            return [], f"{len(words)} labels, as in the file"
        return words, "the labels in the file"
    ids = sorted(int(v) for v in values)
    if ids != list(range(len(ids))):
        return [], f"the numbers {ids[0]} to {ids[-1]} in the file; to measure accuracy use words, or ids from 0"
    for name in _columns(rows):
        if words := _words_by_id(rows, label, name, len(ids)):
            return words, f"the words for the ids 0 to {ids[-1]}, from the column {name}"
    example = "[negative, positive]" if len(ids) == 2 else "[sports, politics, ...]"
    return list(map(str, ids)), f"replace by what the ids 0 to {ids[-1]} mean, in this order, as in {example}"


def _words_by_id(rows: list[Columns], label: str, name: str, count: int) -> list[str]:
    """The words of column `name` in the order of the ids, if it has exactly one for each of `count` ids; else []."""
    labelled = [row for row in rows if row.get(label) not in (None, "")]
    if not all(isinstance(row[label], str | int) and isinstance(row.get(name), str) for row in labelled):
        return []
    pairs = sorted({(int(row[label]), row[name]) for row in labelled})
    words = [word for _, word in pairs if word.strip() and not word.strip().isdecimal()]
    return words if len(pairs) == len(set(words)) == count else []


def _pair(rows: list[Columns], prompt: str, completion: str, answer: str) -> dict[str, Any]:
    """A prompt and a completion with one separator between them, whether or not the values of `answer` start with it."""
    values = [str(v) for v in _values(rows, answer)]
    if sum(v[:1].isspace() for v in values) > len(values) / 2:
        prompt, completion = prompt.removesuffix("\n"), completion.removeprefix(" ")
    return {"prompt": prompt, "completion": completion}


def _skip_gaps(rows: list[Columns], data: DataSettings) -> DataSettings:
    """Add bad_rows: skip, with a note, if rows have gaps that would stop a run: null, or an empty label."""
    labels = data.settings.get("label_names", {})
    gaps = sum(any(row.get(c) is None or c in labels and row[c] == "" for c in data.columns) for row in rows)
    if not gaps:
        return data
    note = {"bad_rows": f"a value is missing in {gaps:,} of {len(rows):,} rows"}
    return DataSettings(data.settings | {"bad_rows": "skip"}, data.notes | note)


def _length(rows: list[Columns], data: DataSettings) -> int:
    """The 95th percentile of an example's characters."""
    sizes = sorted(sum(len(str(row.get(column, ""))) for column in data.columns) for row in rows)
    return sizes[(len(sizes) - 1) * 19 // 20]


def _pick(names: list[str], preferred: tuple[str, ...]) -> str:
    """The first of `preferred` that occurs in `names` (in any case), or else the first name."""
    return next((name for wanted in preferred for name in names if name.lower() == wanted), names[0])
