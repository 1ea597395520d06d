"""Refusals of suggestions that would learn a small part of the rows, or what only looks like text."""

import re
from collections.abc import Sequence
from typing import Any

from lora_ft.commands.init.columns import SAMPLE, VALUE, Table, base_name
from lora_ft.commands.init.names import ANSWERS, LIKE_A_LABEL
from lora_ft.commands.init.rewrites import AS_TEXT
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import listed, printable

WRITTEN_BY_PYTHON = re.compile(r"\s*(\{'|\['|\[\{')")  # the text of a list or an object, which is not JSON
MUCH = 3  # times as much text in columns that are not read as in those that are


def refuse_half_read(name: str, table: Table, columns: Sequence[str], task: str, guessed: bool) -> None:
    """Raise ConfigError if the columns that a suggestion reads are not what their rows are about.

    columns: the last is the answer of a completion. guessed: no name of a column tells that these are the right ones.
    """
    for column in columns:
        if column in table.texts and all(map(WRITTEN_BY_PYTHON.match, table.values(column))):
            raise ConfigError(
                f"{name}: the column {printable(column)} has lists or objects as Python prints them, which are not JSON. Write "
                'the table again: df.to_json("NEW.jsonl", orient="records", lines=True).'
            )
    answer, whole = columns[-1], columns[-1].partition("[")[0]
    others = [c for c in table.columns if re.fullmatch(rf"{re.escape(whole)}\[[^\[\]]+\]", c) and c not in columns]
    inside = re.search(r"\[(\D[^\]]*)\]$", answer)
    named = inside and task == "classification" and any(map(LIKE_A_LABEL.search, (inside[1].lower(), base_name(whole))))
    if task in ("completion", "classification") and inside and not VALUE.search(answer) and others and not named:
        raise ConfigError(
            f"{name}: {printable(whole)} is an object, and {printable(answer)} would be all that is learned of it. Make a text "
            f"of it, and run init on that: {AS_TEXT}"
        )
    unread = [c for c in table.nested_columns if c not in {column.partition("[")[0] for column in columns}]
    sample = table.rows[:SAMPLE]
    read = sum(_characters(row.get(column)) for row in sample for column in columns)
    most = sum(_characters(row.get(column)) for row in sample for column in unread) > MUCH * read
    answers = [c for c in unread if base_name(c) in ANSWERS and any(_characters(row.get(c)) for row in sample)]
    if guessed and (most or answers):
        what = f"most of the text of its rows is in {printable(listed(unread, 3))}"
        what = f"its answers are in {printable(listed(answers, 3))}" if answers else what
        raise ConfigError(
            f"{name}: {what}, lists or objects, which no task reads. Make texts of them, and run init on those: {AS_TEXT}. "
            f"Or go on without them: --task {task}."
        )


def _characters(value: Any) -> int:
    """The characters of the texts in a value, at any depth."""
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0
