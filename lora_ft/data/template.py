"""From a row's columns to text: prompts, completions, label words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from string import Formatter
from typing import Any

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value, printable
from lora_ft.core.names import nearest, template_columns
from lora_ft.data.delimited import separator_hint

Columns = dict[str, Any]


class BadRow(Exception):
    """What is wrong with one row, without where it stands: an error, or with `bad_rows: skip` a row left out."""


@dataclass(frozen=True)
class Template:
    """How a row becomes an example: prompt and completion, or text, or messages (a column's name).

    chat_template: a chat template's text, instead of the tokenizer's own. label_names: words by class id, for each
    column.
    """

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: str | None = None
    chat_template: str | None = None
    label_names: Mapping[str, Sequence[str]] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def label_column(self) -> str | None:
        """The column whose words are the choices of a classification: the one labelled column of the completion.

        With two of them the choices would be pairs of words; that is no classification, and None as well.
        """
        columns = _columns("completion", self.completion or "")
        labelled = [column for column in columns if column in (self.label_names or {})]
        return labelled[0] if len(labelled) == 1 else None


def pair_renderer(template: Template) -> Callable[[Columns], tuple[str, str, list[str], int]]:
    """A function from a row to (prompt, completion, choices, label); [] and -1 if it is no classification."""
    names = template.label_names or {}
    prompt = renderer("prompt", template.prompt or "", names)
    completion = renderer("completion", template.completion or "", names)
    column = template.label_column

    def render(columns: Columns) -> tuple[str, str, list[str], int]:
        if column is None:
            return prompt(columns), completion(columns), [], -1
        label = class_id(columns, column, names[column])
        choices = [completion(columns | {column: choice}) for choice in range(len(names[column]))]
        return prompt(columns), choices[label], choices, label

    return render


def renderer(field: str, template: str, label_names: Mapping[str, Sequence[str]]) -> Callable[[Columns], str]:
    """A function that fills a row's values into the template; it raises BadRow.

    Raises:
        ConfigError: braces that make no sense.
    """
    _columns(field, template)
    parts = [(literal, column) for literal, column, _, _ in Formatter().parse(template)]

    def render(columns: Columns) -> str:
        pieces = []
        for literal, column in parts:
            pieces.append(literal)
            if column is not None and column in label_names:
                words = label_names[column]
                pieces.append(words[class_id(columns, column, words)])
            elif column is not None:
                pieces.append(value_text(columns, column))
        text = "".join(pieces)
        check_unicode(text)
        return text

    return render


def value_text(columns: Columns, column: str) -> str:
    """A str as it is; a number or bool as Python prints it. Null, NaN, lists, objects and no such column: BadRow."""
    value = value_of(columns, column)
    if type(value) is str:
        return value
    if value is None or value != value:
        raise BadRow(f'column "{printable(column)}" is {"null" if value is None else "NaN"}')
    if isinstance(value, (str, int, float)):
        return str(value)
    raise BadRow(f'column "{printable(column)}" is {kind(value)}, and a template takes text or numbers')


def class_id(columns: Columns, column: str, words: Sequence[str]) -> int:
    """The row's class: an id (an int, a whole float, digits in a str), or one of the words themselves."""
    value = value_of(columns, column)
    if isinstance(value, str) and value in words and not any(word.strip().isdecimal() for word in words):
        return words.index(value)  # words made of digits would read as ids and as words
    number = value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        number = int(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int):
        found = f'"{printable(value, 60)}"' if isinstance(value, str) else kind(value)
        near = nearest(value.strip(), words) if isinstance(value, str) else None
        raise BadRow(
            f'column "{printable(column)}" is {found}, and label_names takes a class id from 0 to {len(words) - 1}, or '
            f"one of its words: {printable(', '.join(map(format_value, words)))}"
            + (f". Is {format_value(near)} meant?" if near else "")
        )
    if not 0 <= number < len(words):
        raise BadRow(
            f'column "{printable(column)}" is class {printable(str(number), 20)}, and label_names has words for 0 to '
            f"{len(words) - 1}: {', '.join(words)}"
            + (" (words of digits are not read as words: give ids, or other words)" if str(value) in words else "")
        )
    return int(number)


def value_of(columns: Columns, column: str) -> Any:
    try:
        return columns[column]
    except KeyError:
        near = nearest(column, columns)
        there = printable(", ".join(f'"{c}"' for c in columns)) or "none"
        raise BadRow(
            f'no column "{printable(column)}"; the row has {there}'
            + (separator_hint(list(columns)) or (f'. Is "{printable(near)}" meant?' if near else ""))
        ) from None


def check_unicode(text: str) -> None:
    """Refuse lone surrogates, which JSON can write (\\ud800) and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRow(f"\\u{ord(text[e.start]):04x} in its text is half a character (a lone surrogate)") from None


def kind(value: Any) -> str:
    """What a value is, in JSON's words, for a message."""
    names = {dict: "an object", list: "a list", type(None): "null", bool: "a bool", float: "a fraction", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")


def _columns(field: str, template: str) -> tuple[str, ...]:
    try:
        return template_columns(template)
    except ValueError as e:
        raise ConfigError(f"data.{field}: {e}") from e
