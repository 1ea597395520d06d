"""What a row says and a chat template drops: contents, reasoning, tool calls, tools, the turns of a role."""

import json
import re
from collections.abc import Iterator
from typing import Any

from lora_ft.core.messages import format_value
from lora_ft.data.chats.spans import Located
from lora_ft.data.chats.turns import Conversation, Turn
from lora_ft.data.template import BadRow

THINKING = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def dropped(text: str, located: list[Located], conversation: Conversation) -> list[tuple[str, int]]:
    """(what the template drops, the number of the turn, 0 for the tools) of one chat.

    Raises:
        BadRow: of a supervised turn with content or tool calls nothing is left.
    """
    found, position = [], 0  # position: where the words before were found; those of the next turn usually follow
    spans = {turn.turn: text[turn.start : turn.words_end] for turn in located}
    for i, turn in enumerate(conversation.turns):
        rendered = spans.get(i, text)
        parts = _parts(turn)
        if i not in spans and (at := text.find(turn["content"].strip(), position)) >= 0:
            position, _ = at, parts.pop("the content", None)
        lost = [what for what, words in parts.items() if not all(_contains(rendered, word) for word in words)]
        if i in spans and len(lost) == len(parts):
            what = f"turn {i + 1} (assistant) is empty: the chat template drops {' and '.join(lost)}"
            raise BadRow(f"{what}, which another one may write (data.chat_template)")
        found += [(what if turn["role"] == "assistant" else f"turns of the {turn['role']}", i + 1) for what in lost]
    if any(not _contains(text, _name(tool)) for tool in conversation.tools or []):
        found.append(("the tools", 0))
    return found


def untrained_prompt(text: str, turn: Located) -> str:
    """How the generation prompt before a turn differs from the chat's text there, in words; "" where it does not."""
    skipped = text[len(turn.prompt) : turn.start].strip() if text.startswith(turn.prompt) else ""
    if not turn.prompt or (not skipped and text[: turn.start].endswith(turn.header)):
        return ""
    if skipped:
        return f"the chat template writes {format_value(skipped)} before an answer, but not in its generation prompt"
    return (
        f"the chat template's generation prompt ends in {format_value(turn.header)}, but not the text before an answer"
    )


def reasoning_end(text: str, turn: Located, said: Turn) -> int:
    """Where a turn's words start after its reasoning: at its content, or else at its first tool call."""
    inline = THINKING.match(said["content"])
    reasoning = (inline[1] if inline else said.get("reasoning", "")).strip()
    content = (said["content"][inline.end() :] if inline else said["content"]).strip()
    at = text.find(reasoning, turn.start, turn.end) if reasoning else -1
    if at < 0:
        return turn.start
    end = at + len(reasoning)
    found = text.find(content, end, turn.end) if content else -1
    if found >= 0:
        return found
    closing = re.compile(r"\s*(</\w+>)?\s*").match(text, end)
    return closing.end() if closing else end


def _parts(turn: Turn) -> dict[str, list[str]]:
    """What a turn says, by what it is called in a message: the words that its text must contain."""
    inline = THINKING.match(turn["content"]) if turn["role"] == "assistant" else None
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    parts = {
        "the content": [turn["content"][inline.end() :] if inline else turn["content"]],
        "the reasoning": [inline[1] if inline else turn.get("reasoning", "")],
        "the tool calls": [word for call in calls for word in (call["name"], *_words(call["arguments"]))],
    }
    return {what: words for what, words in parts.items() if any(word.strip() for word in words)}


def _name(tool: dict[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", ""))


def _words(value: Any) -> Iterator[str]:
    """The keys and values of nested arguments, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif value is not None and not isinstance(value, bool):  # a template may write true, True or 1
        yield str(value)


def _contains(text: str, words: str) -> bool:
    """Whether a text has the words, as they are or as JSON, but for case, white space and punctuation."""
    if words.strip() in text:
        return True
    letters = _letters(text)
    escaped = (json.dumps(words, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return any(_letters(form) in letters for form in (words, *escaped) if _letters(form))


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()
