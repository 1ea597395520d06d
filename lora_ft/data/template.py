"""From a row's columns to text: prompts, completions, label words."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value, printable
from lora_ft.core.names import TemplatePart, nearest, template_columns, template_parts
from lora_ft.data.delimited import NO_HEADER

Columns = dict[str, Any]  # a row's values by column
Messages = (
    str | Sequence[str | Mapping[str, str]]
)  # a column of turns, or columns and turns {role: template} to be joined


class BadRow(Exception):
    """The problem with one row, without its location: an error, or a skipped row with `bad_rows: skip`."""


@dataclass(frozen=True)
class Template:
    """How a row becomes an example: a prompt and a completion, or a text, or messages.

    chat_template: the text of a chat template that replaces the tokenizer's. label_names: for each labelled column, the
    words of its classes by id. The others are for chats: settings for the chat template, the roles of the rows, which turns
    are supervised, and whether their reasoning is.
    """

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: Messages | None = None
    chat_template: str | None = None
    label_names: Mapping[str, Sequence[str]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    roles: Mapping[str, str] | None = None
    supervise: str = "all"
    reasoning: str = "keep"

    @cached_property
    def label_column(self) -> str | None:
        """The column that a classification predicts: the only labelled column in the completion.

        None without a labelled column, and with several: the choices would be tuples of words.
        """
        columns = {column for part in _parts("completion", self.completion or "") for column in part.columns}
        labelled = [column for column in columns if column in (self.label_names or {})]
        return labelled[0] if len(labelled) == 1 else None


def pair_renderer(template: Template) -> Callable[[Columns], tuple[str, str, list[str], int, list[int]]]:
    """A function from a row to (prompt, completion, choices, label, spans), where completion is choices[label].

    If the template is not a classification, choices is [] and label -1. spans: start, end, ... of the columns' values in the
    prompt, in characters. Raises as `renderer`.
    """
    names = template.label_names or {}
    prompt = _spans_renderer("prompt", template.prompt or "", names)
    completion = renderer("completion", template.completion or "", names)
    column = template.label_column

    def render(columns: Columns) -> tuple[str, str, list[str], int, list[int]]:
        text, spans = prompt(columns)
        return text, completion(columns), [], -1, spans

    if column is None:
        return render
    words = names[column]

    def choices_of(columns: Columns) -> list[str]:
        return [completion(columns | {column: choice}) for choice in range(len(words))]

    choices_of_all = cache(lambda: choices_of({}))
    same_for_all = {name for part in _parts("completion", template.completion or "") for name in part.columns} == {
        column
    }

    def classify(columns: Columns) -> tuple[str, str, list[str], int, list[int]]:
        text, spans = prompt(columns)
        label = class_id(columns, column, words)
        choices = choices_of_all() if same_for_all else choices_of(columns)
        return text, choices[label], choices, label, spans

    return classify


def renderer(field: str, template: str, label_names: Mapping[str, Sequence[str]]) -> Callable[[Columns], str]:
    """A function that fills a row's values into `template`, the setting data.`field`, and raises BadRow.

    Raises:
        ConfigError: invalid braces or brackets.
    """
    render = _spans_renderer(field, template, label_names)
    return lambda columns: render(columns)[0]


def _spans_renderer(
    field: str, template: str, label_names: Mapping[str, Sequence[str]]
) -> Callable[[Columns], tuple[str, list[int]]]:
    """As `renderer`, with start, end, ... of each column's value in the text."""
    parts = _parts(field, template)

    def render(columns: Columns) -> tuple[str, list[int]]:
        text, spans = "", []
        for part in parts:
            empty = {column for column in part.columns if _is_empty(columns, column)} if part.optional else ()
            if empty and len(empty) == len(set(part.columns)):
                continue
            for literal, column in part.fields:
                text += literal
                if column is not None and column not in empty:
                    words = label_names.get(column)
                    value = value_text(columns, column) if words is None else words[class_id(columns, column, words)]
                    spans += [len(text), len(text) + len(value)]
                    text += value
        check_unicode(text)
        return text, spans

    return render


def optional_columns(template: Template) -> set[str]:
    """The columns that rows need not have: they are in optional parts only."""
    texts = [text for text in (template.prompt, template.completion, template.text) if text]
    return {column for text in texts for column in template_columns(text, optional=True)}


def _is_empty(columns: Columns, column: str) -> bool:
    try:
        value = column_value(columns, column)
    except BadRow:  # the row has no such column
        return True
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def value_text(columns: Columns, column: str) -> str:
    """The value of a column as text: a str unchanged, a number or bool as Python prints it; BadRow for any other value."""
    value = column_value(columns, column)
    if type(value) is str:
        return value
    if value is None or value != value:
        raise BadRow(f'column "{printable(column)}" is {"null" if value is None else "NaN"}')
    if isinstance(value, (str, int, float)):
        return str(value)
    raise BadRow(f'column "{printable(column)}" is {type_in_words(value)}, but a template needs text or numbers')


def class_id(columns: Columns, column: str, words: Sequence[str]) -> int:
    """The class of a row, from 0: the column contains an id (an int, 1.0, or digits in a str) or one of the words."""
    value = column_value(columns, column)
    if isinstance(value, str) and value in words and not any(word.strip().isdecimal() for word in words):
        return words.index(value)  # if words are digits, all values are read as ids
    number = value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        number = int(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int):
        shown = f'"{printable(value, 60)}"' if isinstance(value, str) else type_in_words(value)
        near = nearest(value.strip(), words) if isinstance(value, str) else None
        raise BadRow(
            f'column "{printable(column)}" is {shown}, but label_names needs a class id from 0 to {len(words) - 1} or '
            f"one of its words: {printable(', '.join(map(format_value, words)))}"
            + (f". Did you mean {format_value(near)}?" if near else "")
        )
    if not 0 <= number < len(words):
        raise BadRow(
            f'column "{printable(column)}" is class {printable(str(number), 20)}, but label_names has words for 0 to '
            f"{len(words) - 1}: {', '.join(words)}"
            + (" (words of digits are not read as words: use ids, or other words)" if str(value) in words else "")
        )
    return int(number)


def column_value(columns: Columns, column: str) -> Any:
    """The value of a column, or of `answers[text][0]` inside one; raises BadRow if the row has no such value."""
    if column in columns:
        return columns[column]
    name, *path = re.findall(r"[^\[\]]+", column)
    if name not in columns:
        near = nearest(column, columns)
        names = printable(", ".join(f'"{c}"' for c in columns)) or "no columns"
        unnamed = any(re.search(r"^[\d.]+$|[.?!]$", c) for c in columns)
        hint = f".{NO_HEADER.rstrip('.')}" if unnamed else f'. Did you mean "{printable(near)}"?' if near else ""
        raise BadRow(f'no column "{printable(column)}"; the row has {names}{hint}')
    value = columns[name]
    for key in path:
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (LookupError, TypeError, ValueError):
            raise BadRow(f'column "{printable(name)}" has no value for {printable(column)}') from None
    return value


def check_unicode(text: str) -> None:
    """Raise BadRow for a lone surrogate, which JSON can contain (\\ud800) and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRow(f"\\u{ord(text[e.start]):04x} in its text is half a character (a lone surrogate)") from None


def type_in_words(value: Any) -> str:
    """The type of a value in JSON's terms, for a message."""
    names = {
        dict: "an object",
        list: "a list",
        type(None): "null",
        bool: "a bool",
        float: "a fraction",
        str: "text",
        int: "an int",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _parts(field: str, template: str) -> list[TemplatePart]:
    try:
        return template_parts(template)
    except ValueError as e:
        raise ConfigError(f"data.{field}: {e}") from e
