"""How chat templates read the same turn differently.

One takes contents as texts, another as lists of parts; arguments of a tool call as an object or as JSON text; the content of a
turn that only calls tools as "" or not at all. Which it is, is found by rendering small chats (`ChatFormat.dialect`). What a
template still drops is found row by row (`lora_ft.data.chats.audit`).
"""

import json
from typing import NamedTuple

from lora_ft.data.chats.turns import REASONING_KEYS, Turn


class Dialect(NamedTuple):
    """How a template reads turns.

    parts: contents as [{"type": "text", "text": ...}]. no_content: a turn that only calls tools has no content, instead of
    "". text_arguments: the arguments of a call as JSON text, not as an object.
    """

    parts: bool = False
    no_content: bool = False
    text_arguments: bool = False


def for_template(turn: Turn, dialect: Dialect) -> Turn:
    """A turn as the template reads it."""
    turn = dict(turn)
    if reasoning := turn.pop("reasoning", None):
        turn |= dict.fromkeys(REASONING_KEYS, reasoning)
    if dialect.parts:
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    elif dialect.no_content and turn.get("tool_calls") and not turn["content"]:
        del turn["content"]
    if dialect.text_arguments and turn.get("tool_calls"):
        calls = [(call, call["function"]) for call in turn["tool_calls"]]
        as_text = [f | {"arguments": json.dumps(f["arguments"], ensure_ascii=False)} for _, f in calls]
        turn["tool_calls"] = [call | {"function": f} for (call, _), f in zip(calls, as_text, strict=True)]
    return turn


def calling(*values: str) -> Turn:
    """An assistant's turn with a tool call for each value."""
    functions = [{"name": "@@name@@", "arguments": {"@@key@@": value}} for value in values]
    calls = [{"id": f"call0000{n}", "type": "function", "function": function} for n, function in enumerate(functions)]
    return {"role": "assistant", "content": "", "tool_calls": calls}
