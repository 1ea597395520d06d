"""What a data file seems to be for, by its columns: a chat, a classification, prompts and completions, or plain text."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_ft.commands.init.labels import LABELS, Rows, is_label, values_of, words_of
from lora_ft.core.errors import ConfigError, DataError
from lora_ft.core.messages import printable
from lora_ft.core.names import template_columns
from lora_ft.data.sources import iter_rows

TASKS = {
    "chat": "turns of a chat, of which the assistant's are learned",
    "classification": "a text gets one of a few labels",
    "completion": "a prompt, and what should follow it",
    "text": "plain text: a style, a domain or a language",
}
LOOKED_AT = 20_000  # rows
TEXTS = ("text", "sentence", "review", "content", "body", "comment", "document", "message", "title")
# what is given (all of it), what should follow (one of them), and how the two are written
PAIRS = (
    (
        ("instruction", "input"),
        ("output", "response"),
        "### Instruction:\n{%s}\n\n### Input:\n{%s}\n\n### Response:\n",
        "{%s}",
    ),
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
class Form:
    """A way to learn from some rows. settings: of the config's `data`. notes: setting -> what a reader should know of it."""

    settings: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suggestion:
    """task: one of TASKS, with its form. rows: looked at; partial: the file has more. length: characters of a long example."""

    task: str
    form: Form
    rows: int
    partial: bool
    length: int


def suggest(source: str, task: str | None = None) -> Suggestion:
    """Look at the first rows of `source` and say how to learn from them; `task` overrules the guess of what for.

    Raises:
        DataError: no such file, a line that can't be read, or no rows.
        ConfigError: the columns don't allow the task, or any (they are named).
    """
    read = list(itertools.islice(iter_rows(source), LOOKED_AT + 1))
    if wrong := next((row for row in read if row.problem), None):
        raise DataError(f"{wrong.where}: {wrong.problem}.")
    rows = [row.columns for row in read]
    if not rows:
        raise DataError(f"{printable(source)}: holds no rows.")
    partial, rows = len(rows) > LOOKED_AT, rows[:LOOKED_AT]
    for kind, find in FINDERS:
        if task in (None, kind) and (form := find(rows)) is not None:
            return Suggestion(kind, _gaps_told(rows, form), len(rows), partial, _length(rows, form))
    wanted = f"the task {task} ({TASKS[task]})" if task else f"any of the tasks {', '.join(TASKS)}"
    columns = printable(", ".join(_columns(rows)), 400)
    raise ConfigError(
        f"{printable(source)}: its columns ({columns}) don't suit {wanted}. Name another --task, or write data.prompt, text or "
        "messages by hand: docs/config.md."
    )


def _chat(rows: Rows) -> Form | None:
    names = [name for name in _columns(rows) if all(_is_turns(row.get(name)) for row in rows[:100])]
    return Form({"messages": _first(names, ("messages", "conversations", "conversation"))}) if names else None


def _is_turns(value: Any) -> bool:
    keys = ({"role", "content"}, {"from", "value"})
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(t, dict) and any(k <= t.keys() for k in keys) for t in value)
    )


def _known_pair(rows: Rows) -> Form | None:
    by_lower = {name.lower(): name for name in _columns(rows) if _fits_template(name)}
    for given, answers, prompt, completion in PAIRS:
        answer = next((name for name in answers if name in by_lower), None)
        if answer and all(name in by_lower for name in given) and not is_label(rows, by_lower[answer]):
            columns = [by_lower[name] for name in given]
            return Form(_pair(rows, prompt % tuple(columns), completion % by_lower[answer], by_lower[answer]))
    return None


def _classification(rows: Rows) -> Form | None:
    columns = [name for name in _columns(rows) if _fits_template(name)]
    labels = [name for name in columns if is_label(rows, name)]
    labels = [name for name in labels if name.lower() in LABELS] or labels
    texts = [name for name in _texts(rows, columns) if name not in labels]
    if not labels or not texts:
        return None
    label, text = _first(labels, LABELS), _first(texts, TEXTS)
    form = _pair(rows, f"{_title(text)}: {{{text}}}\n{_title(label)}:", f" {{{label}}}", label)
    words, note = words_of(rows, _columns(rows), label)
    return Form(
        form | ({"label_names": {label: words}} if words else {}), {"label_names" if words else "completion": note}
    )


def _two_texts(rows: Rows) -> Form | None:
    texts = _texts(rows, [name for name in _columns(rows) if _fits_template(name)])
    if len(texts) != 2:
        return None
    note = "guessed from the columns' order"
    return Form(_pair(rows, f"{{{texts[0]}}}\n", f"{{{texts[1]}}}", texts[1]), {"completion": note})


def _text(rows: Rows) -> Form | None:
    texts = _texts(rows, [name for name in _columns(rows) if _fits_template(name)])
    return Form({"text": f"{{{_first(texts, TEXTS)}}}"}) if texts else None


FINDERS: tuple[tuple[str, Callable[[Rows], Form | None]], ...] = (
    ("chat", _chat),
    ("completion", _known_pair),
    ("classification", _classification),
    ("completion", _two_texts),
    ("text", _text),
)


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _fits_template(name: str) -> bool:
    """Whether a template can name the column."""
    try:
        return template_columns(f"{{{name}}}") == (name,)
    except ValueError:
        return False


def _texts(rows: Rows, columns: list[str]) -> list[str]:
    """The columns that hold text of some length, in their order; those of mere words only where there is nothing else."""
    held = {name: values_of(rows, name) for name in columns}
    held = {name: values for name, values in held.items() if values and all(isinstance(v, str) for v in values)}
    mean = {name: sum(map(len, values)) / len(values) for name, values in held.items()}
    distinct = {name: len(set(values)) for name, values in held.items()}
    plain = [name for name in mean if not all(v.strip().isdecimal() for v in held[name])]
    return [name for name in plain if mean[name] >= 20 and distinct[name] > 1] or plain


def _pair(rows: Rows, prompt: str, completion: str, answer: str) -> dict[str, Any]:
    """A prompt and its completion; the blank between them stands once, whether the data has it or not."""
    given = [str(v) for v in values_of(rows, answer)]
    if sum(v[:1].isspace() for v in given) > len(given) / 2:
        prompt, completion = prompt.removesuffix("\n"), completion.removeprefix(" ")
    return {"prompt": prompt, "completion": completion}


def _gaps_told(rows: Rows, form: Form) -> Form:
    """Rows in which a column of the form is null, or a label empty, would stop a run: they are left out, and that is said."""
    labels = form.settings.get("label_names", {})
    gaps = sum(any(row.get(c) is None or c in labels and row[c] == "" for c in _used(form)) for row in rows)
    if not gaps:
        return form
    note = f"{gaps:,} of {len(rows):,} rows looked at have a gap"
    return Form(form.settings | {"bad_rows": "skip"}, form.notes | {"bad_rows": note})


def _used(form: Form) -> set[str]:
    """The columns that a form reads."""
    templates = [form.settings[name] for name in ("prompt", "completion", "text") if name in form.settings]
    columns = {column for template in templates for column in template_columns(template)}
    return columns or {form.settings["messages"]}


def _length(rows: Rows, form: Form) -> int:
    """Characters of a long example: nineteen of twenty are no longer."""
    sizes = sorted(sum(len(str(row.get(column, ""))) for column in _used(form)) for row in rows)
    return sizes[(len(sizes) - 1) * 19 // 20]


def _first(names: list[str], preferred: tuple[str, ...]) -> str:
    return next((name for wanted in preferred for name in names if name.lower() == wanted), names[0])


def _title(name: str) -> str:
    return name.replace("_", " ").strip().capitalize()
