"""Guess from the columns of data how to train on it: as chats, classification, prompts and completions, or text."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_ft.commands.init.chats import detect_chat, detect_preferences, through_chat_template
from lora_ft.commands.init.columns import LABEL_NAMES, DataSettings, Table, base_name, column_names, title
from lora_ft.commands.init.labels import class_words
from lora_ft.core.errors import ConfigError, DataError
from lora_ft.core.messages import listed, printable
from lora_ft.data.files import file_format
from lora_ft.data.sources import iter_rows
from lora_ft.data.template import Columns

TASKS = {
    "chat": "turns of a chat; the model learns the assistant's",
    "classification": "a text gets one of a few labels",
    "completion": "a prompt, and the completion that follows it",
    "text": "plain text: a style, a domain or a language",
}
MAX_ROWS = 20_000  # read from the source
TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "document", "message", "title")
ANSWERS = (
    "output",
    "response",
    "completion",
    "answer",
    "answers",
    "solution",
    "reply",
    "target",
    "summary",
    "highlights",
)
INSTRUCTION = "### Instruction:\n{%s}{CONTEXT}\n\n### Response:\n"
QUESTION = "{CONTEXT}Question: {%s}\nAnswer:"
SUMMARY = "{%s}\n\nSummary:"
# (the column that asks, the columns that answer, of which one; prompt; completion; how a context column is written)
PAIRS = (
    (("instruction",), ANSWERS, INSTRUCTION, "{%s}", "\n\n### %s:\n{%s}"),
    (("question",), ANSWERS, QUESTION, " {%s}", "%s: {%s}\n\n"),
    (("prompt", "query"), ANSWERS, "{CONTEXT}{%s}\n", "{%s}", "%s: {%s}\n\n"),
    (("source",), ("target",), "{%s}\n", "{%s}", ""),
    (("input",), ("output", "target"), "{CONTEXT}{%s}\n", "{%s}", "%s: {%s}\n\n"),
    (("article", "document", "text", "dialogue"), ("highlights", "summary"), SUMMARY, " {%s}", ""),
)
CONTEXTS: tuple[str, ...] = (
    "input",
    "context",
    "passage",
    "background",
    "paragraph",
    "document",
    "article",
    "story",
    "facts",
    "schema",
)
CONTEXTS += ("system", "options", "choices", "hint", "text", "knowledge")


@dataclass(frozen=True)
class Suggestion:
    """A task of TASKS with its settings. rows: examined; partial: there are more. unused: columns that no setting reads."""

    task: str
    data: DataSettings
    rows: int
    partial: bool
    unused: tuple[str, ...] = ()
    examined: Sequence[Columns] = ()


def suggest(
    sources: str | Sequence[str], task: str | None = None, chat: bool = False, format: Mapping[str, Any] | None = None
) -> Suggestion:
    """Examine the first rows of the sources and suggest how to train on them, for `task` or else for the task they suggest.

    chat: the model has a chat template. format: of text files, as `data.format`.

    Raises:
        DataError: no such file, a malformed row, or no rows.
        ConfigError: the columns do not suit the task, or any task.
    """
    sources = [sources] if isinstance(sources, str) else sources
    every = itertools.chain.from_iterable(iter_rows(source, file_format(format)) for source in sources)
    source_rows = list(itertools.islice(every, MAX_ROWS + 1))
    if bad := next((row for row in source_rows if row.problem), None):
        raise DataError(f"{bad.where}: {bad.problem}.")
    rows, name = [row.columns for row in source_rows[:MAX_ROWS]], printable(", ".join(sources))
    if not rows:
        raise DataError(f"{name}: no rows.")
    table = Table(rows)
    for found, detect in DETECTORS:
        if task in (None, found) and (data := detect(table)) is not None:
            break
    else:
        goal = f"the task {task} ({TASKS[task]})" if task else f"any of the tasks {', '.join(TASKS)}"
        raise ConfigError(
            f"{name}: its columns ({printable(', '.join(column_names(rows)), 400)}) do not suit {goal}. Choose another "
            "--task, or write data.prompt, text or messages by hand: docs/config.md."
        )
    if chat and found == "completion" and "prompt" in data.settings:
        data = through_chat_template(table, data)
    data = _skip_gaps(table, data)
    read = {base_name(column) for column in data.columns}
    filled = [column for column in column_names(rows) if any(row.get(column) not in (None, "", []) for row in rows)]
    unused = tuple(column for column in filled if base_name(column) not in read)
    return Suggestion(found, data, len(rows), len(source_rows) > MAX_ROWS, unused, rows)


def _detect_known_pair(table: Table) -> DataSettings | None:
    for asks, answers, prompt, completion, section in PAIRS:
        question, answer = table.find(asks), table.find(answers)
        if (
            not question
            or not answer
            or (table.is_label(answer) and base_name(answer) in LABEL_NAMES)
            or question == answer
        ):
            continue
        if table.is_label(answer) and len({*map(str, table.values(answer))}) * 5 <= len(table.values(answer)):
            continue  # few labels: a classification
        named = [c for c in table.columns if base_name(c) in CONTEXTS and c not in (question, answer)]
        contexts = [c for c in named if section and table.values(c) and (c in table.texts or "[" in c)]
        parts = [(c, section % (title(c), c)) for c in contexts]
        context = "".join(f"[[{part}]]" if table.has_gaps(c) else part for c, part in parts)
        text = (prompt % question.replace("%", "%%")).replace("{CONTEXT}", context)
        settings = pair(table, text, completion % answer, answer)
        optional = tuple(c for c in contexts if table.has_gaps(c))
        note = {"prompt": f"{listed(optional)} may be empty: [[...]] is left out then"} if optional else {}
        if "[" in answer:
            note["completion"] = f"the first of the values in {answer.partition('[')[0]}"
        return DataSettings(settings, note, (question, *contexts, answer), optional)
    return None


def _detect_classification(table: Table) -> DataSettings | None:
    labels = [name for name in table.columns if table.is_label(name)]
    labels = [name for name in labels if base_name(name) in LABEL_NAMES] or labels
    texts = [name for name in table.long_texts if name not in labels]
    if not labels or not texts:
        return None
    label = table.find(LABEL_NAMES, labels) or labels[0]
    words, note, ids_in = class_words(table, label)
    texts = [name for name in texts if name != ids_in]
    parts = [(name, f"{title(name)}: {{{name}}}\n") for name in texts]
    optional = tuple(name for name in texts if table.has_gaps(name) and len(texts) > 1)
    text = "".join(f"[[{part}]]" if name in optional else part for name, part in parts)
    settings = pair(table, f"{text}{title(label)}:", f" {{{label}}}", label)
    columns = (*texts, label, *([ids_in] if ids_in else []))
    if not words:
        return DataSettings(settings, {"completion": note}, columns, optional)
    return DataSettings(settings | {"label_names": {label: words}}, {"label_names": note}, columns, optional)


def _detect_two_texts(table: Table) -> DataSettings | None:
    texts = table.long_texts
    if len(texts) != 2:
        return None
    settings = pair(table, f"{{{texts[0]}}}\n", f"{{{texts[1]}}}", texts[1])
    return DataSettings(settings, {"completion": "guessed from the order of the columns"}, tuple(texts))


def _detect_text(table: Table) -> DataSettings | None:
    if not table.long_texts:
        return None
    text = table.find(TEXT_NAMES, table.long_texts) or table.long_texts[0]
    return DataSettings({"text": f"{{{text}}}"}, {}, (text,))


def _preferences(table: Table, form: str) -> DataSettings | None:
    found = detect_preferences(table)
    return found if found and form in found.settings else None


DETECTORS = (
    ("chat", partial(_preferences, form="messages")),
    ("completion", partial(_preferences, form="prompt")),
    ("text", partial(_preferences, form="text")),
    ("chat", detect_chat),
    ("completion", _detect_known_pair),
    ("classification", _detect_classification),
    ("completion", _detect_two_texts),
    ("text", _detect_text),
)


def pair(table: Table, prompt: str, completion: str, answer: str) -> dict[str, Any]:
    """A prompt and a completion with one separator between them, whether or not the values of `answer` start with it."""
    values = [str(v) for v in table.values(answer)]
    if sum(v[:1].isspace() for v in values) > len(values) / 2:
        prompt, completion = prompt.removesuffix("\n"), completion.removeprefix(" ")
    return {"prompt": prompt, "completion": completion}


def name_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names for the columns of rows without a header line: text and label, or prompt and completion."""
    table = Table([dict(zip(map(str, range(len(row))), row, strict=True)) for row in rows])
    kinds = ["label" if table.is_label(name) else "text" for name in table.columns]
    if kinds == ["text", "text"]:
        return ["prompt", "completion"]
    return [kind if kinds.count(kind) == 1 else f"{kind}{kinds[:i].count(kind) + 1}" for i, kind in enumerate(kinds)]


def _skip_gaps(table: Table, data: DataSettings) -> DataSettings:
    """Add bad_rows: skip, with a note, if rows have gaps that would stop a run: null, or an empty label."""
    labels = data.settings.get("label_names", {})
    needed = [c for c in data.columns if c not in data.optional]
    gaps = sum(any(row.get(c) is None or c in labels and row[c] == "" for c in needed) for row in table.rows)
    if not gaps:
        return data
    note = {"bad_rows": f"a value is missing in {gaps:,} of {len(table.rows):,} rows"}
    return replace(data, settings=data.settings | {"bad_rows": "skip"}, notes=data.notes | note)
