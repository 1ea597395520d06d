"""Multiple choice: a question with its choices, and the letter or number of the right one."""

import re

from lora_ft.commands.init import names
from lora_ft.commands.init.columns import DataSettings, Table, base_name, title
from lora_ft.commands.init.labels import LETTERS, class_words

MAX_CHOICES = 8


def detect_choices(table: Table) -> DataSettings | None:
    """Settings for a question whose choices are a list, or columns such as option1 and option2."""
    choices, key = choice_columns(table), table.find(names.KEYS)
    asked = [
        name for name in table.long_texts if name not in (*choices, key) and not names.REASONING.search(name.lower())
    ]
    asked = table.without_parts(asked)
    if not choices or not asked or key is None or len(set(map(str, table.values(key)))) > len(choices):
        return None
    values = sorted(set(map(str, table.values(key))))
    if values[0] in LETTERS:
        marks = LETTERS
    elif all(value.isdecimal() for value in values) and int(values[-1]) <= len(choices):
        marks = LETTERS if "0" in values else "123456789"
    else:
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


def choice_columns(table: Table) -> list[str]:
    """The columns of the choices, in order; [] if there are none."""
    inside = [c for c in table.columns if base_name(c) in names.CHOICES and re.search(r"\[\d\]$", c)]
    for prefix in dict.fromkeys(c.rpartition("[")[0] for c in inside):
        items = [c for c in inside if c.rpartition("[")[0] == prefix][:MAX_CHOICES]
        if len(items) > 1 and not all(str(v) in LETTERS for c in items for v in table.values(c)):
            return items
    stems: dict[str, list[str]] = {}
    for column in table.columns:
        if match := names.ONE_CHOICE.match(column.lower()):
            stems.setdefault(match[1], []).append(column)
    return next((columns for columns in stems.values() if len(columns) > 1), [])
