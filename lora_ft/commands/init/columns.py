"""What the columns of data hold: texts, labels, turns of chats, or values inside objects and lists."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_ft.commands.init import names
from lora_ft.core.names import template_columns
from lora_ft.data.chats.turns import parse_json
from lora_ft.data.template import BadRow, Columns

MAX_ITEMS = 10  # of a list, such as choices, that become columns
MAX_CLASSES, MAX_NAMED_CLASSES = 20, 200  # of a column, and of one that is named like a label
SAMPLE = 100  # rows that show what a column holds
ID = re.compile(r"(?=.*\d)[\x21-\x7e]{6,}")  # a word with a digit: a key, a hash, an address
VALUE = re.compile(r"\[(text|value|answer|spans)\](\[0\])?$")
NUMBER = re.compile(r"\s*[-+]?[\d.,]*\d[\d.,]*(e[-+]?\d+)?\s*%?", re.IGNORECASE)
TURN_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


@dataclass(frozen=True)
class DataSettings:
    """Settings of a config's data section, and by setting a note for the reader of the config."""

    settings: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()  # that are read
    optional: tuple[str, ...] = ()  # of them, those that may be empty
    reasoning: str | None = None  # the column that is learned before the answer


class Table:
    """Rows whose columns of objects and lists are also columns of the values inside them: `answers[text][0]`."""

    def __init__(self, rows: Sequence[Columns], class_names: Mapping[str, list[str]] | None = None):
        self.class_names = class_names or {}
        nested = {name for row in rows[:SAMPLE] for name, value in row.items() if isinstance(value, list | dict)}
        tests = {name: is_list_of_said if base_name(name) in names.CHATS else is_chat for name in column_names(rows)}
        self.chats = [name for name, test in tests.items() if _holds(rows, name, test)]
        nested -= set(self.chats)
        self.rows = [_with_parts(row, nested) for row in rows] if nested else list(rows)
        self.nested_columns = [name for name in column_names(rows) if name in nested]
        self._values: dict[str, list[Any]] = {}

    @cached_property
    def columns(self) -> list[str]:
        """The columns that a template can name, in order."""
        return [name for name in column_names(self.rows) if _fits(name) and not _holds(self.rows, name, _is_nested)]

    @cached_property
    def texts(self) -> list[str]:
        """The columns with texts that are not addresses, dates and the like, in order; not the items of longer lists."""
        return [name for name in self.columns if self._is_text(name)]

    def _is_text(self, name: str) -> bool:
        values = self.values(name)
        if not values or not all(isinstance(v, str) for v in values) or self.is_item(name):
            return False
        if all(map(NUMBER.fullmatch, values)):
            return False
        worded = sum(len(v.split()) > 2 for v in values) * 2 > len(values)
        return worded or not (names.META.search(base_name(name)) or all(ID.fullmatch(v) for v in values))

    def is_item(self, name: str) -> bool:
        """Whether a column is an item of a list that has others in some row."""
        prefix, found, _ = name.partition("[0]")
        return bool(re.search(r"\[[1-9]\d*\]", name)) or bool(
            found and self.values(f"{prefix}[1]{name[len(prefix) + 3 :]}")
        )

    @cached_property
    def long_texts(self) -> list[str]:
        """The texts of 20 characters on average, if there are none all texts; of several rows only what differs in them."""
        varied = [n for n in self.texts if len(set(self.values(n))) > 1 or len(self.rows) == 1]
        return [n for n in varied if sum(map(len, self.values(n))) >= 20 * len(self.values(n))] or varied

    def values(self, name: str) -> list[Any]:
        """The values of a column, without gaps."""
        if name not in self._values:
            self._values[name] = [v for row in self.rows if (v := row.get(name)) is not None and v != ""]
        return self._values[name]

    def all_items_have(self, name: str, key: str) -> bool:
        """Whether a column has lists of objects, each with a text under `key`."""
        lists = [value for row in self.rows[:SAMPLE] if (value := row.get(name))]
        items = [item for value in lists for item in (value if isinstance(value, list) else [None])]
        return bool(items) and all(isinstance(item, dict) and isinstance(item.get(key), str) for item in items)

    def has_gaps(self, name: str) -> bool:
        """Whether a column is empty in some rows."""
        return len(self.values(name)) < len(self.rows)

    def is_label(self, name: str) -> bool:
        """Whether a column has few distinct short values, five rows each on average (two if it is named like a label)."""
        values = self.values(name)
        if not values or self.is_item(name):
            return False
        if not all(isinstance(v, str | int) or isinstance(v, float) and v.is_integer() for v in values):
            return False
        classes = set(values)
        short = all(len(str(v)) <= 40 and "\n" not in str(v) for v in classes)
        named = bool(names.LIKE_A_LABEL.search(base_name(name))) or name in self.class_names
        per_class, most = (2, MAX_NAMED_CLASSES) if named else (5, MAX_CLASSES)
        return short and 2 <= len(classes) <= min(most, len(values) // per_class)

    def find(self, wanted: Sequence[str], among: Sequence[str] | None = None) -> str | None:
        """The column with the first of these names, in any case; of an object its text or value."""
        by_name: dict[str, str] = {}
        for column in sorted(self.columns if among is None else among, key=lambda c: not VALUE.search(c)):
            by_name.setdefault(base_name(column), column)
        return next(filter(None, map(by_name.get, wanted)), None)

    def without_parts(self, texts: Sequence[str]) -> list[str]:
        """The texts that are not a part of another one of them."""
        return [c for c in texts if not any(self.contains(other, c) for other in texts if other != c)]

    def contains(self, name: str, *parts: str) -> bool:
        """Whether a text contains the values of all these other columns, in most rows."""
        rows = [row for row in self.rows[:SAMPLE] if row.get(name)]
        full = [row for row in rows if all(str(row.get(part) or "") in str(row[name]) for part in parts)]
        return 2 * len(full) > len(rows)


def base_name(column: str) -> str:
    """The name of a column in lower case, with `_` between words; of a value inside a column the column's."""
    return re.sub(r"[ -]", "_", column.partition("[")[0].strip().lower())


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


def is_list_of_said(value: Any) -> bool:
    """Whether a value is a chat, or a list of what the user and the assistant said in turn."""
    return is_chat(value) or isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)


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
        inside = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value[:MAX_ITEMS])
            if isinstance(value, list)
            else ()
        )
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
