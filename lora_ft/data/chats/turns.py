"""What a row says: turns, tool calls and tools in the forms of OpenAI, ShareGPT and Arrow, as one form.

A turn has `role` and `content` (text, "" for none), and where the row has them `reasoning` (text), `tool_calls`
([{"type": "function", "function": {"name", "arguments": an object}}], with the call's `id` if it has one), `name` and
`tool_call_id`. Null values of objects are dropped at any depth: Arrow fills them in where the rows of a file differ, so a
Parquet file could not be told from JSON Lines otherwise.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lora_ft.core.messages import format_value, printable
from lora_ft.core.names import nearest
from lora_ft.data.chats.raw_turns import message_parts, parse_json, with_system
from lora_ft.data.template import BadRow, Messages, check_unicode, type_in_words

Turn = dict[str, Any]

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
SYNONYMS = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "tool_result", "ipython"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's: the text of such a turn is a call, or a list of calls
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "train", "training")  # OpenAI's, and axolotl's two
LIKE_A_WEIGHT = re.compile("loss|mask|train|weight|supervis|learn", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, the tools that they may call, and the positions of the turns to supervise, in order.

    ignored: what of the row has no effect, in words, with the number of the turn (0 for the row).
    """

    turns: list[Turn]
    tools: list[dict] | None
    supervised: list[int]
    ignored: list[tuple[str, int]]


def read_conversation(
    columns: Mapping[str, Any], messages: Messages, roles: Mapping[str, str] | None = None, supervise: str = "all"
) -> Conversation:
    """The conversation in a row: its turns, and the columns `system` and `tools` (or `functions`) if it has any.

    messages: their column, or a list of columns and of turns {role: text with columns in braces}; of a list only the last
    part is supervised. roles: role in the row -> role for the chat template, before those known here. supervise: "all"
    assistant turns, or the "last" one.

    Raises:
        BadRow: the column is not a list of turns, a turn has no text, an unknown role or broken tool calls; or no assistant
            turn is to be supervised.
    """
    ignored: list[tuple[str, int]] = []
    parts = message_parts(columns, messages)
    raw = with_system(list(chain.from_iterable(parts)), columns, ignored)
    turns = [_turn(turn, number, roles or {}, ignored) for number, turn in enumerate(raw, 1)]
    ignored += [(f"the column `{c}`: only text is trained on", 0) for c in ("image", "images") if columns.get(c)]
    supervised = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and _is_trained(raw[i], i + 1)]
    if not supervised:
        if any(turn["role"] == "assistant" for turn in turns):
            raise BadRow("every assistant turn has weight 0 (or train: false), so nothing is supervised")
        names = printable(", ".join(dict.fromkeys(turn["role"] for turn in turns)))
        raise BadRow(f"no assistant turn, so nothing is supervised; its roles are {names}")
    supervised = [i for i in supervised if i >= len(turns) - len(parts[-1])]
    if not supervised:
        raise BadRow("the last part of data.messages has no assistant turn, so nothing is supervised")
    return Conversation(turns, _tools(columns), supervised if supervise == "all" else supervised[-1:], ignored)


def read_prompt(
    columns: Mapping[str, Any], messages: Messages, roles: Mapping[str, str] | None = None
) -> tuple[list[Turn], list[dict] | None]:
    """The turns and tools of a row that asks for an answer: without a final turn of the assistant.

    Raises:
        BadRow: as `read_conversation`.
    """
    raw = with_system(list(chain.from_iterable(message_parts(columns, messages))), columns, [])
    turns = [_turn(turn, number, roles or {}, []) for number, turn in enumerate(raw, 1)]
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns, _tools(columns)


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects that are null, at any depth; elements of lists are kept."""
    if isinstance(value, Mapping):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list | tuple) else value


def _turn(raw: Any, number: int, roles: Mapping[str, str], ignored: list[tuple[str, int]]) -> Turn:
    if not isinstance(raw, dict):
        raise BadRow(f"turn {number} is {type_in_words(raw)}, not an object with role and content, or from and value")
    turn = without_nulls(raw)
    if "role" not in turn and "from" in turn:
        turn |= {"role": turn.pop("from"), "content": turn.pop("value", None)}
    said, content = turn.get("role"), turn.get("content")
    if not isinstance(said, str):
        raise BadRow(f"turn {number} has no role (or from); it has {printable(', '.join(map(str, turn))) or 'nothing'}")
    role = roles.get(said, SYNONYMS.get(said, said))
    calls = _calls(turn.pop("tool_calls", None), turn.pop("function_call", None), number)
    if role in CALL_ROLES and role not in roles.values():
        calls, content, role = _calls(content, None, number), "", "assistant"
    if role not in KNOWN_ROLES and role not in roles.values():
        near = nearest(role, (*KNOWN_ROLES, *SYNONYMS))
        target = SYNONYMS.get(near or "", near or "user")
        raise BadRow(
            f"turn {number} has the unknown role {format_value(said)}: say what it is with data.roles, as in "
            f"data.roles: {{{printable(said, 30)}: {target}}}"
        )
    content = _joinmessage_parts(content, number) if isinstance(content, list) else content
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise BadRow(f"turn {number} ({printable(role, 30)}): its content is {type_in_words(content)}, not text")
    check_unicode(content)
    given = (turn.pop(key, None) for key in REASONING_KEYS)
    reasoning = next((text for text in given if isinstance(text, str) and text.strip()), "")
    if role == "assistant" and not (content.strip() or calls or reasoning) and _is_trained(raw, number):
        raise BadRow(f"turn {number} (assistant) is empty: it has no content and no tool calls")
    for key in [key for key in turn if LIKE_A_WEIGHT.search(key)]:
        if key not in WEIGHT_KEYS:
            ignored.append((f"the unknown key `{printable(key, 30)}` of turns", number))
        elif role != "assistant" and turn[key] not in (0, False):
            ignored.append((f"the key `{key}` of turns of the {role}: only assistant turns are supervised", number))
        del turn[key]
    more = ({"reasoning": reasoning} if reasoning else {}) | ({"tool_calls": calls} if calls else {})
    return turn | {"role": role, "content": content} | more


def _is_trained(raw: Mapping[str, Any], number: int) -> bool:
    """Whether an assistant turn is to be supervised, by its own `weight`, `train` and `training`."""
    given = {key: raw[key] for key in WEIGHT_KEYS if raw.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise BadRow(
                f"turn {number}: its {key} is {format_value(value)}; only 0 and 1 (or false and true) are supported"
            )
    return all(given.values())


def _calls(value: Any, legacy: Any, number: int) -> list[dict]:
    """OpenAI's tool calls, or its older single `function_call`, also as JSON text; arguments become objects."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value, f"turn {number}: the text of its tool calls")
    calls = value if isinstance(value, list) else [value] if value else []
    return [_call(call, number) for call in [*calls, *([legacy] if legacy else [])]]


def _call(call: Any, number: int) -> dict:
    if isinstance(call, str):
        call = parse_json(call, f"turn {number}: a tool call")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"turn {number}: a tool call is {type_in_words(call)} without the name of a function")
    name, arguments = function["name"], function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"turn {number}: the text of the arguments of {printable(name, 40)}")
    if not isinstance(arguments, dict):
        shown = type_in_words(arguments)
        raise BadRow(f"turn {number}: the arguments of {printable(name, 40)} are {shown}, not an object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return identity | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(columns: Mapping[str, Any]) -> list[dict] | None:
    column = next((name for name in ("tools", "functions") if columns.get(name)), None)
    if column is None:
        return None
    value, what = columns[column], f'the column "{column}"'
    value = parse_json(value, what) if isinstance(value, str) and value.strip() else value
    tools = []
    for tool in value if isinstance(value, list) else [value] if value else []:
        tool = parse_json(tool, what) if isinstance(tool, str) else without_nulls(tool)
        if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
            raise BadRow(f"{what} has {type_in_words(tool)}, not the JSON Schema of a function")
        tools.append(tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool})
    return tools or None


def _joinmessage_parts(parts: list, number: int) -> str:
    """The text of content parts: [{"type": "text", "text": ...}, ...], with the text under `text` or `value`."""
    texts = []
    for part in parts:
        part_type = format_value(part.get("type")) if isinstance(part, dict) else None
        text = (part.get("text") or part.get("value", part.get("text"))) if isinstance(part, dict) else None
        if part_type not in ('"text"', '"input_text"', '"output_text"') or not isinstance(text, str):
            shown = f"of type {part_type}" if part_type else type_in_words(part)
            raise BadRow(
                f'turn {number}: a part of its content is {shown}, not {{"type": "text", "text": ...}}; only text can be '
                "trained on"
            )
        texts.append(text)
    return "".join(texts)
