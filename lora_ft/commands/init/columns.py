"""What the columns of data hold: texts, labels, turns of chats, or values inside objects and lists."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_ft.core.names import template_columns
from lora_ft.data.chats.turns import parse_json
from lora_ft.data.template import BadRow, Columns

MAX_CLASSES = 20
SAMPLE = 100  # rows that show what a column holds
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "target", "rating", "stars")
META = re.compile(
    r"(^|[_ ])(u?u?id|idx|index|url|uri|link|date|time|timestamp|source|lang|language|license|path|file)s?$"
)
TURN_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


@dataclass(frozen=True)
class DataSettings:
    """Settings of a config's data section, and by setting a note for the reader of the config."""

    settings: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()  # that are read
    optional: tuple[str, ...] = ()  # of them, those that may be empty


class Table:
    """Rows whose columns of objects and lists are also columns of the values inside them: `answers[text][0]`."""

    def __init__(self, rows: Sequence[Columns]):
        nested = {name for row in rows[:SAMPLE] for name, value in row.items() if isinstance(value, list | dict)}
        self.chats = [name for name in column_names(rows) if _holds(rows, name, is_chat)]
        nested -= set(self.chats)
        self.rows = [_with_parts(row, nested) for row in rows] if nested else list(rows)
        self.nested = {part: part.partition("[")[0] for part in column_names(self.rows) if "[" in part}
        self._values: dict[str, list[Any]] = {}

    @cached_property
    def columns(self) -> list[str]:
        """The columns that a template can name, in order."""
        return [name for name in column_names(self.rows) if _fits(name) and not _holds(self.rows, name, _is_nested)]

    @cached_property
    def texts(self) -> list[str]:
        """The columns with texts that are not addresses, dates and the like, in order; of a list only the first value."""
        words = []
        for name in self.columns:
            values = self.values(name)
            is_text = bool(values) and all(isinstance(v, str) for v in values)
            shown = is_text and not all(v.strip().isdecimal() for v in values) and not META.search(base_name(name))
            if shown and not (
                self.nested.get(name) and self.values(name.rpartition("[")[0] + "[0]") and name[-3:] != "[0]"
            ):
                words.append(name)
        return words

    @cached_property
    def long_texts(self) -> list[str]:
        """The texts of 20 characters on average and more than one value; if there are none, all texts."""
        long = [n for n in self.texts if sum(map(len, self.values(n))) >= 20 * len(self.values(n))]
        return [n for n in long if len(set(self.values(n))) > 1] or self.texts

    def values(self, name: str) -> list[Any]:
        """The values of a column, without gaps."""
        if name not in self._values:
            self._values[name] = [v for row in self.rows if (v := row.get(name)) is not None and v != ""]
        return self._values[name]

    def has_gaps(self, name: str) -> bool:
        """Whether a column is empty in some rows."""
        return len(self.values(name)) < len(self.rows)

    def is_label(self, name: str) -> bool:
        """Whether a column has few distinct short values, five rows each on average (two if it is named like a label)."""
        values = self.values(name)
        if not values or not all(isinstance(v, str | int) or isinstance(v, float) and v.is_integer() for v in values):
            return False
        classes = set(values)
        short = all(len(str(v)) <= 40 and "\n" not in str(v) for v in classes)
        per_class = 2 if base_name(name) in LABEL_NAMES else 5
        return short and 2 <= len(classes) <= min(MAX_CLASSES, len(values) // per_class)

    def find(self, names: Sequence[str], among: Sequence[str] | None = None) -> str | None:
        """The column with the first of these names, in any case."""
        by_name: dict[str, str] = {}
        for column in self.columns if among is None else among:
            by_name.setdefault(base_name(column), column)
        return next(filter(None, map(by_name.get, names)), None)


def base_name(column: str) -> str:
    """The name of a column in lower case; of a value inside a column the column's."""
    return column.partition("[")[0].strip().lower()


def title(column: str) -> str:
    """A column's name as the heading of its value."""
    return column.partition("[")[0].replace("_", " ").strip().capitalize()


def column_names(rows: Sequence[Columns]) -> list[str]:
    """The names of all columns, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns, or its JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value, "")
        except BadRow:
            return False
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(t, Mapping) and any(k <= t.keys() for k in TURN_KEYS) for t in turns)


def is_history(value: Any) -> bool:
    """Whether a value is a list of pairs of a question and an answer, possibly empty."""
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | dict)


def _holds(rows: Sequence[Columns], name: str, test: Any) -> bool:
    """Whether the first values of a column pass a test, at least one of them."""
    values = [value for row in rows[:SAMPLE] if (value := row.get(name)) not in (None, "")]
    return bool(values) and all(map(test, values))


def _with_parts(row: Columns, nested: set[str]) -> Columns:
    """The row with the texts and numbers inside its nested columns as further columns."""
    parts: Columns = {}

    def add(name: str, value: Any, depth: int) -> None:
        inside = value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()
        for key, part in inside:
            if isinstance(part, list | dict):
                if depth < 3:
                    add(f"{name}[{key}]", part, depth + 1)
            else:
                parts[f"{name}[{key}]"] = part

    for name in nested:
        add(name, row.get(name), 1)
    return row | parts


def _fits(name: str) -> bool:
    try:
        return template_columns(f"{{{name}}}") == (name,)
    except ValueError:
        return False
