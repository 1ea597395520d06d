"""Multiple choice: a question with its choices, and the letter or number of the right one."""

import re

from lora_ft.commands.init import names
from lora_ft.commands.init.columns import DataSettings, Table, base_name, title
from lora_ft.commands.init.labels import LETTERS, class_words

ONE = re.compile(r"\[(\d|[A-J])\]$")  # an item of a list, or of an object with a letter for each choice


def detect_choices(table: Table) -> DataSettings | None:
    """Settings for a question whose choices are a list, or columns such as option1 and option2."""
    choices = choice_columns(table)
    found = ((name, _marks(table, name, len(choices))) for name in (table.find([key]) for key in names.KEYS) if name)
    key, marks = next(((name, marks) for name, marks in found if marks), ("", ""))
    others = [c for c in table.columns if c not in choices and base_name(c) not in names.KEYS]
    asked = [c for c in others if c in table.long_texts or base_name(c) in names.ASKS]  # few may be asked, as in COPA
    asked = table.without_parts([c for c in asked if not names.REASONING.search(base_name(c))])
    if not asked or not key:
        return None
    words, _, _ = class_words(table, key)
    label_names = {"label_names": {key: list(LETTERS[: len(choices)])}} if marks == LETTERS and words else {}
    lines = [(c, f"{mark}. {{{c}}}\n") for c, mark in zip(choices, marks, strict=False)]
    text = "".join(f"{title(name)}: {{{name}}}\n" for name in asked)
    text += "".join(f"[[{line}]]" if table.has_gaps(c) else line for c, line in lines)
    end, space = ("", " ") if marks == LETTERS else ("\n", "")  # as for other classes
    settings = {"prompt": f"{text}Answer:{end}", "completion": f"{space}{{{key}}}"} | label_names
    sign = "letter" if marks == LETTERS else "number"
    notes = {"label_names" if label_names else "completion": f"the {sign} of the right choice"}
    return DataSettings(settings, notes, (*asked, *choices, key), tuple(c for c in choices if table.has_gaps(c)))


def _marks(table: Table, key: str, count: int) -> str:
    """The marks of `count` choices that the values of a column are, letters or numbers from 1; "" if they are neither."""
    values = set(map(str, table.values(key)))
    if not count or not values or len(values) > count:
        return ""
    if values <= set(LETTERS[:count]):
        return LETTERS
    if not all(value.isdecimal() for value in values) or max(map(int, values)) > min(count, 9):
        return ""
    return LETTERS if "0" in values else "123456789"


def choice_columns(table: Table) -> list[str]:
    """The columns of the choices, in order; [] if there are none."""
    inside = [c for c in table.columns if base_name(c) in names.CHOICES and ONE.search(c)]
    for prefix in dict.fromkeys(c.rpartition("[")[0] for c in inside):
        items = [c for c in inside if c.rpartition("[")[0] == prefix]
        if len(items) > 1 and not all(str(v) in LETTERS for c in items for v in table.values(c)):
            return items
    stems: dict[str, list[str]] = {}
    for column in table.columns:
        if match := names.ONE_CHOICE.match(column.lower()):
            stems.setdefault(match[1], []).append(column)
    return next((columns for columns in stems.values() if len(columns) > 1), [])
