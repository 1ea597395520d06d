"""Guess from the columns of data how to train on it: as chats, classification, prompts and completions, or text."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_ft.commands.init import names
from lora_ft.commands.init.chats import detect_chat, detect_preferences, through_chat_template
from lora_ft.commands.init.choices import choice_columns, detect_choices
from lora_ft.commands.init.columns import DataSettings, Table, base_name, column_names, title
from lora_ft.commands.init.half_read import refuse_half_read
from lora_ft.commands.init.labels import class_words
from lora_ft.commands.init.rewrites import AS_TEXT
from lora_ft.commands.init.texts import detect_text
from lora_ft.core.errors import ConfigError, DataError
from lora_ft.core.messages import listed, printable
from lora_ft.data.files import file_format
from lora_ft.data.sources import class_names, iter_rows
from lora_ft.data.template import Columns

TASKS = {
    "chat": "turns of a chat; the model learns the assistant's",
    "classification": "a text gets one of a few labels",
    "completion": "a prompt, and the completion that follows it",
    "text": "plain text: a style, a domain or a language",
}
MAX_ROWS = 20_000  # read from the source


@dataclass(frozen=True)
class Suggestion:
    """A task of TASKS with its settings. rows: examined; partial: there are more. unused: columns that no setting reads."""

    task: str
    data: DataSettings
    rows: int
    partial: bool
    unused: tuple[str, ...] = ()
    examined: Sequence[Columns] = ()

    @property
    def unused_note(self) -> str:
        """What a reader is told about the columns that no setting reads; "" if there are none."""
        if not self.unused:
            return ""
        lists = [c for c in self.unused if any(isinstance(row.get(c), list | dict) for row in self.examined)]
        note = f"not used: {printable(listed(self.unused), 300)}."
        if self.task == "chat":
            return note
        note += " If an answer depends on a column, name it in the prompt."
        return note + (f" Of lists, as {listed(lists, 3)}, make texts first (docs/data.md)." if lists else "")


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
    table = Table(rows, {name: words for source in sources for name, words in class_names(source).items()})
    for found, detect in DETECTORS:
        if task in (None, found) and (data := detect(table)) is not None:
            break
    else:
        goal = f"the task {task} ({TASKS[task]})" if task else f"any of the tasks {', '.join(TASKS)}"
        nested = printable(listed(table.nested_columns, 3))
        hint = f" Of lists and objects, as {nested}, make texts first: {AS_TEXT}" if nested else ""
        raise ConfigError(
            f"{name}: its columns ({printable(', '.join(column_names(rows)), 400)}) do not suit {goal}. Choose another "
            f"--task, or write data.prompt, text or messages by hand: docs/config.md.{hint}"
        )
    guessed = task is None and detect in (_detect_texts_in_order, detect_text)
    refuse_half_read(name, table, data.columns, found, guessed)
    if chat and found == "completion" and "prompt" in data.settings:
        data = through_chat_template(table, data)
    data = _skip_gaps(table, data)
    read = {base_name(column) for column in data.columns}
    filled = [column for column in column_names(rows) if any(row.get(column) not in (None, "", []) for row in rows)]
    unused = tuple(column for column in filled if column.strip() and base_name(column) not in read)
    return Suggestion(found, data, len(rows), len(source_rows) > MAX_ROWS, unused, rows)


def _detect_known_pair(table: Table) -> DataSettings | None:
    for asks, answers, prompt, completion, section in names.PAIRS:
        question, answer = table.find(asks), table.find(answers)
        if not question or not answer or question == answer or table.is_item(question):
            continue
        few = table.is_label(answer) and len({*map(str, table.values(answer))}) * 5 <= len(table.values(answer))
        if few or (table.is_label(answer) and names.LIKE_A_LABEL.search(base_name(answer))):
            continue  # a classification
        choices = choice_columns(table) if section else []
        named = [c for c in table.columns if base_name(c) in names.CONTEXTS and c not in (question, answer, *choices)]
        contexts = [c for c in named if section and c in table.texts and not table.contains(c, question, answer)]
        parts = [(c, section % (title(c), c)) for c in [*contexts, *choices]]
        context = "".join(f"[[{part}]]" if table.has_gaps(c) else part for c, part in parts)
        text = (prompt % question.replace("%", "%%")).replace("{CONTEXT}", context)
        settings = pair(table, text, completion % answer, answer)
        contexts += choices
        optional = tuple(c for c in contexts if table.has_gaps(c))
        note = {"prompt": f"{listed(optional)} may be empty: [[...]] is left out then"} if optional else {}
        if "[0]" in answer:
            note["completion"] = f"the first of the values in {answer.partition('[')[0]}"
        if thought := next((c for c in table.long_texts if names.REASONING.search(base_name(c))), None):
            first = f"[[{{{thought}}}\n\n]]" if table.has_gaps(thought) else f"{{{thought}}}\n\n"
            settings["completion"] = settings["completion"].replace("{", first + "{", 1)
            note["completion"] = f"first the {title(thought).lower()}; take {{{thought}}} out to learn the answer alone"
            contexts, optional = [*contexts, thought], (*optional, *([thought] if table.has_gaps(thought) else []))
        return DataSettings(settings, note, (question, *contexts, answer), optional, thought)
    return None


def _detect_classification(table: Table) -> DataSettings | None:
    every = [name for name in table.columns if table.is_label(name)]
    labels = [name for name in every if _is_named_label(table, name)]
    texts = [c for c in table.long_texts if c not in every and not names.REASONING.search(base_name(c))]
    if not labels and (measure := table.find(names.LABELS)) and _is_short(table, measure):
        labels, texts = [measure], [c for c in texts if c != measure]  # a number, or too many classes for the rows
    guessed, labels = not labels, labels or every
    if not labels or not texts:
        return None
    label = table.find(names.LABELS, labels) or labels[0]
    unsure = guessed or base_name(label) in names.WEAK_LABELS
    alone = all(base_name(c) in names.TEXTS for c in texts) or guessed and _are_alike(texts)
    if unsure and len(texts) == 2 and not alone:
        return None  # rather a question and an answer
    words, note, ids_in = (
        class_words(table, label) if table.is_label(label) else ([], "many values, learned as text", "")
    )
    others = [c for c in labels if c not in (label, ids_in)]
    note += f"; other columns with few values: {listed(others, 5)}" if others else ""
    note += "; a guess, for another reading see --task" if guessed else ""
    texts = table.without_parts([name for name in texts if name != ids_in])
    parts = [(name, f"{title(name)}: {{{name}}}\n") for name in texts]
    optional = tuple(name for name in texts if table.has_gaps(name) and len(texts) > 1)
    text = "".join(f"[[{part}]]" if name in optional else part for name, part in parts)
    digits = not words and all(str(v)[:1] in "-0123456789" for v in table.values(label))
    end, space = ("\n", "") if digits else ("", " ")  # in many vocabularies " 1" and " 2" begin with the same token
    settings = pair(table, f"{text}{title(label)}:{end}", f"{space}{{{label}}}", label)
    columns = (*texts, label, *([ids_in] if ids_in else []))
    if not words:
        return DataSettings(settings, {"completion": note}, columns, optional)
    return DataSettings(settings | {"label_names": {label: words}}, {"label_names": note}, columns, optional)


def _is_named_label(table: Table, name: str) -> bool:
    """Whether a column is named like a label, is stored as one, or answers a column that asks."""
    base = base_name(name)
    answers = any(table.find(asks) not in (None, name) and base in answers for asks, answers, *_ in names.PAIRS)
    return bool(names.LIKE_A_LABEL.search(base)) or name in table.class_names or answers


def _are_alike(columns: Sequence[str]) -> bool:
    """Whether columns have one name but for the number or letter at its end, as question1 and question2."""
    return len({re.sub(r"_?([0-9]|(?<=_)[a-h])$", "", base_name(c)) for c in columns}) == 1


def _is_short(table: Table, name: str) -> bool:
    """Whether the values of a column are numbers, or a word or two."""
    values = [] if table.is_item(name) else table.values(name)
    short = all(isinstance(v, int | float) or len(v) <= 40 and len(v.split()) <= 2 for v in values)
    return short and len(set(values)) > 1


def _detect_texts_in_order(table: Table) -> DataSettings | None:
    """Two texts of which the first asks for the second; or more, if none of them has the name of a text by itself."""
    *asked, answer = [c for c in table.long_texts if not c.endswith("[0]")] or [""]
    asked = [c for c in asked if not table.contains(c, answer)]  # the whole example, besides its parts
    if not asked or len(asked) > 1 and table.find(names.TEXTS, [*asked, answer]):
        return None
    prompt = f"{{{asked[0]}}}\n" if len(asked) == 1 else "".join(f"{title(c)}: {{{c}}}\n" for c in asked)
    settings = pair(table, prompt, f"{{{answer}}}", answer)
    return DataSettings(settings, {"completion": "guessed from the order of the columns"}, (*asked, answer))


def _preferences(table: Table, form: str) -> DataSettings | None:
    found = detect_preferences(table)
    return found if found and form in found.settings else None


DETECTORS = (
    ("chat", partial(_preferences, form="messages")),
    ("completion", partial(_preferences, form="prompt")),
    ("text", partial(_preferences, form="text")),
    ("chat", detect_chat),
    ("classification", detect_choices),
    ("completion", _detect_known_pair),
    ("classification", _detect_classification),
    ("completion", _detect_texts_in_order),
    ("text", detect_text),
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
    gaps = sum(
        any(row.get(c) is None or c in labels and row[c] in ("", -1, "-1") for c in needed) for row in table.rows
    )
    if not gaps:
        return data
    note = {"bad_rows": f"a value is missing in {gaps:,} of {len(table.rows):,} rows"}
    return replace(data, settings=data.settings | {"bad_rows": "skip"}, notes=data.notes | note)
