"""The spans of a chat's text that are supervised.

Supervised of a turn is what a model that is prompted with the template's generation prompt has to generate: everything after
that prompt, up to and including the first marker that ends the turn. White space and other markers after it, such as ChatML's
newline or an end-of-sequence token that only closes the chat, belong to the template. If a template ends turns with no token,
the end-of-sequence token is appended after an assistant turn that ends the chat; otherwise the model would never learn to stop.

The template's own {% generation %} marks are used where it has them. Otherwise a turn is found in the chat's text

- from its start: the generation prompt before it, and the text of the turns up to and including it, are usually prefixes of the
  chat's text, but for how the end of a chat is closed;
- else from its end: what follows a probe in place of the turn is what follows the turn. This finds turns whose earlier
  reasoning a template removes, or whose system prompt it moves to the last user turn.

A row where neither works is bad: spans are never guessed.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from lora_ft.data.chats.format import PROBE, ChatFormat
from lora_ft.data.chats.turns import Conversation, Turn
from lora_ft.data.template import BadRow

MAX_RENDERED = 4_000_000  # turns, those before each supervised one: about a minute of a core


class Words(NamedTuple):
    """Where a turn starts, where its words end, and where what certainly belongs to it ends: white space, closing tags."""

    start: int
    words_end: int
    end: int


@dataclass(frozen=True)
class Located:
    """One supervised turn in the text of its chat.

    turn: its position. prompt: the generation prompt before it; header: what that adds to the turns before. start, end: its
    span. words_end: where its own words end, before what closes it. end_marker: the marker that ends it, "" if none does.
    """

    turn: int
    prompt: str
    header: str
    start: int
    words_end: int
    end: int
    end_marker: str


def locate_turns(text: str, conversation: Conversation, chat: ChatFormat) -> tuple[str, list[Located]]:
    """The supervised turns of a chat in its text, and the text, with an end-of-sequence token if nothing else ends it.

    Raises:
        BadRow: a turn cannot be located; the message has its number.
    """
    turns, tools = conversation.turns, conversation.tools
    if len(turns) * len(conversation.supervised) > MAX_RENDERED:
        raise BadRow(
            f"{len(turns):,} turns, {len(conversation.supervised):,} of them supervised: too many to render "
            "the chat up to each of these. Split it into shorter chats, or set data.supervise: last"
        )
    marked = _marked(text, conversation, chat)
    located = []
    for i in conversation.supervised:
        prompt = (chat.try_render(turns[:i], tools, generation_prompt=True) or "") if i else ""
        before = (chat.try_render(turns[:i], tools) or "") if i else ""
        if span := marked.get(i):  # marks may include the header, which the generation prompt has already
            span = span._replace(
                start=max(span.start, min(_start(text, prompt, before, None, chat) or 0, span.words_end))
            )
        else:
            span = _span(text, turns, tools, i, prompt, before, chat)
        if span is None:
            raise BadRow(
                f"turn {i + 1} (assistant) cannot be located in the chat template's text, in which earlier turns change when "
                "later ones follow, or contents are rewritten. Use a template with {% generation %} around assistant turns"
            )
        found = Located(i, prompt, prompt[chat.agreement(before, prompt) :], *span, "")
        located.append(_with_end(text, found, chat))
    positions = [0] + [position for turn in located for position in (turn.start, turn.end)]
    if positions != sorted(positions):
        raise BadRow("the chat template renders its assistant turns out of order")
    last, eos = located[-1], chat.tokenizer.eos_token
    if last.turn == len(turns) - 1 and eos and not (last.end_marker and chat.is_token(last.end_marker)):
        text += eos
        located[-1] = replace(last, end=len(text), end_marker=eos)
    return text, located


def _marked(text: str, conversation: Conversation, chat: ChatFormat) -> dict[int, Words]:
    """The template's own {% generation %} marks by turn; {} if it has none, or not one for each assistant turn."""
    marked_text, spans = chat.generation_spans(conversation.turns, conversation.tools)
    assistant = [i for i, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]
    if marked_text != text or len(spans) != len(assistant):
        return {}
    words = (Words(start, _words_end(text[:end], start, chat), end) for start, end in spans)
    return dict(zip(assistant, words, strict=True))


def _span(
    text: str,
    turns: list[Turn],
    tools: list[dict] | None,
    i: int,
    prompt: str,
    before: str,
    chat: ChatFormat,
) -> Words | None:
    """Turn i by its start, after the generation prompt, and by its end. before: the text of the turns before it."""
    start, around = _start(text, prompt, before, None, chat), None
    if start is None:
        around = _around(text, turns, tools, i, chat)
        start = _start(text, prompt, before, around[0], chat) if around else None
    if start is None:
        return None
    after = text if i == len(turns) - 1 else chat.try_render(turns[: i + 1], tools)
    if after is not None:
        words_end = _words_end(after, start, chat)
        if len(after) >= start and text.startswith(after[:words_end]):
            return Words(start, words_end, chat.agreement(after, text))
    around = around or _around(text, turns, tools, i, chat)
    if around is None or not text.endswith(around[1]) or len(text) - len(around[1]) < start:
        return None
    words_end = len(text) - len(around[1])
    return Words(start, words_end, words_end)


def _around(text: str, turns: list[Turn], tools: list[dict] | None, i: int, chat: ChatFormat) -> tuple[str, str] | None:
    """The text before and after a probe in place of turn i; None if that cannot be found out."""
    probe = {"role": "assistant", "content": PROBE}
    probed = chat.try_render([*turns[:i], probe, *turns[i + 1 :]], tools) if PROBE not in text else None
    left, found, right = (probed or "").partition(PROBE)
    return (left, right) if found and PROBE not in right else None


def _start(text: str, prompt: str, before: str, left: str | None, chat: ChatFormat) -> int | None:
    """Where what a turn has to generate starts. left: the text before a probe in place of the turn, if that was tried."""
    if prompt:
        agreed = chat.agreement(prompt, text)
        # If it adds nothing to the turns before, it may end with the user's turn, or lack the assistant's header.
        if agreed == len(prompt) and (prompt != before or (left is not None and not left[agreed:].strip())):
            return agreed
        # A generation prompt that opens what the text never has, such as <think>: the turn starts after its header.
        if prompt != before and agreed > chat.agreement(before, prompt):
            return agreed
    if left is None:
        return None
    stem, tail = left.rstrip(), prompt[len(prompt.rstrip()) :]
    if chat.header.strip() and chat.header in left:
        at = left.rfind(chat.header) + len(chat.header)
        return at if text.startswith(left[:at]) else None
    if prompt and prompt == before and stem[-8:] == prompt.rstrip()[-8:]:  # the prompt ends with the user's turn
        left = stem + tail
    return len(left) if text.startswith(left) else None


def _words_end(text: str, start: int, chat: ChatFormat) -> int:
    """Where the last turn of a text ends, without the markers and white space that close it."""
    while True:
        stripped = text.rstrip()
        last = next((m for m in chat.markers.finditer(stripped, start) if m.end() == len(stripped)), None)
        if last is None or last.start() < start:
            return max(len(stripped), start)
        text = stripped[: last.start()]


def _with_end(text: str, turn: Located, chat: ChatFormat) -> Located:
    """The turn up to the marker that ends it: the first one after its words, a token of its own if there is one."""
    found, position = [], turn.words_end
    while match := chat.next_marker.match(text, position):
        found.append(match)
        position = match.end()
    ends = [match for match in found if match[1] in chat.ends]
    for match in [match for match in ends if chat.is_token(match[1])] or ends:
        return replace(turn, words_end=match.start(1), end=match.end(), end_marker=match[1])
    return replace(turn, words_end=turn.end)
