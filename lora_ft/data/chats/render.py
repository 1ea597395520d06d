"""From a row with a chat to its text, the spans of it that are supervised, and what is to be told about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_ft.core.messages import format_value
from lora_ft.data.chats.audit import dropped, reasoning_end, untrained_prompt
from lora_ft.data.chats.format import ChatFormat, Span
from lora_ft.data.chats.spans import locate_turns
from lora_ft.data.chats.turns import Conversation, Turn, read_conversation
from lora_ft.data.cuts import OTHER, SYSTEM, USER, TurnSpan
from lora_ft.data.template import Template, check_unicode

SWITCHES = (
    ("enable_thinking", False),
    ("thinking", False),
    ("enable_thinking", True),
    ("thinking", True),
)  # well-known
ROLES = {"user": USER, "system": SYSTEM, "developer": SYSTEM}
MIN_WORDS = 12  # characters


@dataclass
class RenderedChat:
    """A chat as the model is trained on it.

    text: what the template renders. spans: its supervised parts, in order. prompt: the generation prompt for the last of
    them. notes: (what is dropped, ignored or different, number of the turn or 0). turns: kind of turn -> [how many there
    are, how many are supervised]. ends: marker -> how many supervised turns it ends ("": nothing does). others: the words of
    the turns that are not supervised.
    """

    text: str
    spans: list[Span]
    prompt: str
    notes: list[tuple[str, int]] = field(default_factory=list)
    turns: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    others: list[TurnSpan] = field(default_factory=list)


def render_chat(columns: Mapping[str, Any], template: Template, chat: ChatFormat) -> RenderedChat:
    """The chat of a row.

    Raises:
        BadRow: broken turns, a template that fails, nothing supervised, or a turn that cannot be located or comes out empty.
    """
    assert template.messages is not None
    conversation = read_conversation(columns, template.messages, template.roles, template.supervise)
    turns, tools = conversation.turns, conversation.tools
    rendered = chat.render(turns, tools)
    check_unicode(rendered)
    text, located = locate_turns(rendered, conversation, chat)
    notes = [(f"the chat template drops {what}", number) for what, number in dropped(text, located, conversation)]
    notes += [(f"not used: {what}", number) for what, number in conversation.ignored]
    for turn in located:
        end = chat.markers.search(text, turn.words_end, turn.end)
        if end and end[0] in chat.ends and not chat.is_token(end[0]):
            notes.append(
                (f"the chat template ends turns in {end[0]}, which is not a token of this tokenizer", turn.turn + 1)
            )
        if difference := untrained_prompt(text, turn):
            notes.append((_way_out(difference, turn.turn, conversation, chat), turn.turn + 1))
    starts = [reasoning_end(text, t, turns[t.turn]) if template.reasoning == "drop" else t.start for t in located]
    spans = [(start, turn.end) for start, turn in zip(starts, located, strict=True)]
    kinds: dict[str, list[int]] = {}
    for i, said in enumerate(turns):
        count = kinds.setdefault(_kind(said), [0, 0])
        count[0] += 1
        count[1] += i in conversation.supervised
    ends: dict[str, int] = {}
    for turn in located:
        ends[turn.end_marker] = ends.get(turn.end_marker, 0) + 1
    last = located[-1]
    return RenderedChat(
        text, spans, last.prompt or text[: last.start], notes, kinds, ends, _other_turns(text, conversation)
    )


def turn_starts(columns: Mapping[str, Any], template: Template, chat: ChatFormat) -> list[tuple[str, int]]:
    """(kind of turn, where it starts in the chat's text) for each turn of a row that `render_chat` accepts, for display."""
    assert template.messages is not None
    conversation = read_conversation(columns, template.messages, template.roles, template.supervise)
    text, located = locate_turns(chat.render(conversation.turns, conversation.tools), conversation, chat)
    supervised, starts = {turn.turn: turn for turn in located}, [0]
    for i in range(1, len(conversation.turns)):
        if i - 1 in supervised:
            start = supervised[i - 1].end
        elif i in supervised:
            start = supervised[i].start - len(chat.header) * text[: supervised[i].start].endswith(chat.header)
        else:
            start = chat.agreement(chat.try_render(conversation.turns[:i], conversation.tools) or "", text)
        starts.append(max(start, starts[-1]))
    kinds, first = [*map(_kind, conversation.turns)], conversation.turns[0]
    if ROLES.get(first["role"]) != SYSTEM and "system" in text[: max(text.find(first["content"].strip()), 0)]:
        kinds[0] += ", after the chat template's own system prompt"
    return list(zip(kinds, starts, strict=True))


def _other_turns(text: str, conversation: Conversation) -> list[TurnSpan]:
    """The words of the turns that are not supervised, as far as they are found in the text as they are.

    Of few letters none are looked for: they may be found in a turn's header.
    """
    found, position = [], 0
    for i, turn in enumerate(conversation.turns):
        words, role = turn["content"].strip(), ROLES.get(turn["role"], OTHER)
        few = len(words) < MIN_WORDS and words.isascii() and (role != SYSTEM or not words)
        if i not in conversation.supervised and not few and (start := text.find(words, position)) >= 0:
            found.append(TurnSpan(start, start + len(words), role))
            position = position if role == SYSTEM else start + len(words)  # it may be moved into another turn
    return found


def _kind(turn: Turn) -> str:
    return turn["role"] + (" with tool calls" if turn.get("tool_calls") else "")


def _way_out(difference: str, i: int, conversation: Conversation, chat: ChatFormat) -> str:
    """The difference between the generation prompt and how turn i begins, with what to do about it."""
    turns, tools = conversation.turns, conversation.tools
    kind = difference, i == len(turns) - 1, "reasoning" in turns[i], "tool_calls" in turns[i]
    if kind not in chat.advice:
        way_out = "set data.chat_template to a template that agrees"
        for name, value in SWITCHES:
            other = chat.with_switch(name, value)
            prompt, text = other.try_render(turns[:i], tools, True), other.try_render(turns, tools)
            if prompt and text and text.startswith(prompt):
                way_out = f"set data.chat_template_kwargs: {{{name}: {format_value(value)}}}"
                break
        else:
            way_out = way_out if kind[1] else "set data.supervise: last"
        chat.advice[kind] = f"{difference}; so answers are asked for after a beginning that was not trained: {way_out}"
    return chat.advice[kind]


class ChatSummary:
    """What is told about the chats of a data set: its notes, with how often each applies and where first, and its turns."""

    def __init__(self) -> None:
        self.notes: dict[str, list] = {}
        self.turns: dict[str, list[int]] = {}
        self.ends: dict[str, int] = {}

    def add(self, where: str, chat: RenderedChat) -> None:
        """Add the chat of the row at `where`."""
        for note, turn in chat.notes:
            self.notes.setdefault(note, [0, f"{where}, turn {turn}" if turn else where])[0] += 1
        for kind, (count, supervised) in chat.turns.items():
            counts = self.turns.setdefault(kind, [0, 0])
            counts[:] = counts[0] + count, counts[1] + supervised
        for marker, count in chat.ends.items():
            self.ends[marker] = self.ends.get(marker, 0) + count

    def facts(self) -> dict[str, Any]:
        """For a report: a sentence for each note; kind of turn -> [turns, supervised turns]; end marker -> turns."""
        notes = [f"{note} ({count:,} times, first in {first})" for note, (count, first) in self.notes.items()]
        return {"notes": notes, "turns": self.turns, "turn_ends": self.ends}
