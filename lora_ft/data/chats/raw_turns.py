"""The turns of a row as they are written: from one column, or from several and from turns with text from columns."""

import itertools
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from lora_ft.core.messages import printable
from lora_ft.core.names import template_columns
from lora_ft.data.template import BadRow, Columns, Messages, column_value, renderer, type_in_words


def message_parts(columns: Mapping[str, Any], messages: Messages) -> list[list[Any]]:
    """The turns of each part of data.messages; a column in a list may be empty, but not the last."""
    if isinstance(messages, str):
        return [_list_of_turns(column_value(dict(columns), messages))]
    parts = []
    for i, part in enumerate(messages, 1):
        if not isinstance(part, str):
            ((role, template),) = part.items()
            content = _filler(template)(dict(columns))
            parts.append([{"role": role, "content": content}] if content.strip() or role == "assistant" else [])
        elif i < len(messages) and not columns.get(part):
            parts.append([])
        else:
            parts.append(_list_of_turns(column_value(dict(columns), part)))
    if not any(parts):
        raise BadRow("all parts of data.messages are empty")
    return parts


@lru_cache(maxsize=64)
def _filler(template: str) -> Callable[[Columns], str]:
    return renderer("messages", template, {})


def message_columns(messages: Messages) -> list[str]:
    """The columns that data.messages names, in order."""
    if isinstance(messages, str):
        return [messages]
    columns: dict[str, None] = {}
    for part in messages:
        names = [part] if isinstance(part, str) else itertools.chain.from_iterable(map(template_columns, part.values()))
        columns |= dict.fromkeys(names)
    return list(columns)


def asked_messages(columns: Mapping[str, Any], messages: Messages | None) -> Messages | None:
    """How to read the turns of a row that asks: as in training without the answer, or its `messages`; None if it has none."""
    asked = messages if messages is None or isinstance(messages, str) else messages[:-1]
    if asked and any(columns.get(name) or columns.get(name.partition("[")[0]) for name in message_columns(asked)):
        return asked
    return "messages" if columns.get("messages") else None


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text; a BadRow that names `what` if it is broken."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadRow(f"{what} is not valid JSON: {printable(text, 60)}") from e


def _list_of_turns(value: Any) -> list[Any]:
    """A column's value as a list of turns: a list (also of pairs of question and answer, or of the texts of the user and the
    assistant in turn), its JSON text, or the object of lists that a hub data set may have."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parse_json(value, "its text of messages")
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        keys = [key for key, several in value.items() if isinstance(several, list)]
        value = [dict(zip(keys, turn, strict=True)) for turn in zip(*(value[key] for key in keys), strict=False)]
    if isinstance(value, list) and value and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        value = [
            {"role": r, "content": text} for pair in value for r, text in zip(("user", "assistant"), pair, strict=True)
        ]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value):
        value = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
    if not isinstance(value, list) or not value:
        shown = "an empty list" if value == [] else type_in_words(value)
        raise BadRow(f"its messages are {shown}, not a list of turns with role and content, or from and value")
    return value


def with_system(turns: list[Any], columns: Mapping[str, Any], ignored: list[tuple[str, int]]) -> list[Any]:
    """The turns, with the column `system` as the first if they have no system turn."""
    system, first = columns.get("system"), turns[0] if isinstance(turns[0], dict) else {}
    if not isinstance(system, str) or not system.strip():
        return turns
    if first.get("role", first.get("from")) not in ("system", "developer"):
        return [{"role": "system", "content": system}, *turns]
    if first.get("content", first.get("value")) != system:
        ignored.append(("the column `system`, as the turns start with a system turn", 0))
    return turns
