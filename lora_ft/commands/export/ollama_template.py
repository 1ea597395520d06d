"""A run's prompts as a template of Ollama (Go's text/template), where it says exactly the same.

Ollama joins all system messages as .System, and messages of one role that follow each other; so a chat is perhaps a system
message, then users' and assistants' messages in turn. What a chat template writes around them is found by rendering small
chats, and is right if others come out the same. See https://github.com/ollama/ollama/blob/main/docs/template.md.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lora_ft.commands.generate.prompts import PromptFormat
from lora_ft.data.chats.format import ChatFormat
from lora_ft.data.chats.turns import Turn
from lora_ft.data.template import BadRow

PROMPT = "@@731@@"
SYSTEM: Turn = {"role": "system", "content": "@@0@@"}
TURNS: list[Turn] = [{"role": ("user", "assistant")[i % 2], "content": f"@@{i + 1}@@"} for i in range(5)]


class Pieces(NamedTuple):
    """What a chat template writes: before and after a user's and an assistant's message, and at the end of the prompt.

    start: before all if there is no system message. system: else before and after that; None if it has no place.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    header: str

    def fill(self, turns: Sequence[Turn]) -> str:
        """What `go` makes of a chat."""
        text = self.start
        for turn in turns:
            match turn["role"]:
                case "system":
                    assert self.system
                    text = turn["content"].join(self.system)
                case "user":
                    text += turn["content"].join(self.user)
                case "assistant":
                    text += turn["content"].join(self.assistant)
        return text + self.header

    def go(self) -> str:
        """The template."""
        start = literal(self.start)
        if self.system:
            otherwise = f"{{{{ else }}}}{start}" if start else ""
            start = f"{{{{ if .System }}}}{_around('.System', self.system)}{otherwise}{{{{ end }}}}"
        user, assistant = _around(".Content", self.user), _around(".Content", self.assistant)
        message = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
        return f"{start}{{{{ range .Messages }}}}{message}{{{{ end }}}}{literal(self.header)}"


def ollama_template(form: PromptFormat) -> tuple[str | None, str]:
    """(the template, or None where none is right; what to know about it, or "")."""
    if form.is_chat:
        assert form.chat
        pieces = chat_pieces(form.chat)
        pieces = pieces and without_added(form, pieces)
        if pieces is None:
            why = "the run's chat template does more than Ollama's could say"
            return None, f"no TEMPLATE: {why}. Ollama takes that of FROM's GGUF, if it knows it"
        return pieces.go(), "" if pieces.system else "its TEMPLATE has no place for a system message"
    try:
        text, note = form.from_text(PROMPT)[0], ""
    except BadRow:
        text, note = PROMPT, f"the run's prompts have the columns {', '.join(form.needed)}: give Ollama whole prompts"
    return "{{ .Prompt }}".join(map(literal, text.split(PROMPT))), note


def chat_pieces(chat: ChatFormat) -> Pieces | None:
    """The pieces of a chat template; None if it does not write the same around every message."""
    texts = _texts_around(chat, TURNS[:3])
    if texts is None:
        return None
    start, after_user, between, end = texts
    closing = end.removesuffix(chat.header)
    if not after_user.startswith(closing):
        return None
    user, assistant = ("", closing), (after_user.removeprefix(closing), between)
    with_system = _texts_around(chat, [SYSTEM, TURNS[0]])
    system = (with_system[0], with_system[1]) if with_system else None
    first_marker = chat.next_marker.match(between)
    opening = between[first_marker.end() :].lstrip() if first_marker else ""  # of a user's message after an answer
    if opening and all(text.endswith(opening) for text in (start, *(system or ())[1:])):
        user, assistant = (opening, closing), (assistant[0], between.removesuffix(opening))
        start, system = start.removesuffix(opening), system and (system[0], system[1].removesuffix(opening))
    pieces = Pieces(start, system, user, assistant, end.removeprefix(closing))

    def right(*before: Turn) -> bool:
        chats = ([*before, *TURNS[:n]] for n in (1, 3, 5))
        return all(pieces.fill(turns) == chat.try_render(turns, generation_prompt=True) for turns in chats)

    if not right():
        return None
    return pieces if system and right(SYSTEM) else pieces._replace(system=None)


def without_added(form: PromptFormat, pieces: Pieces) -> Pieces | None:
    """The pieces without what the tokenizer, in a GGUF too, puts before every text; None if the chat does not begin so."""
    assert form.chat
    added = "".join(form.chat.tokenizer.convert_ids_to_tokens(list(form.encoder.before)))
    starts = [pieces.start, *(pieces.system or ())[:1]]
    if not all(start.startswith(added) for start in starts):
        return None
    system = pieces.system and (pieces.system[0].removeprefix(added), pieces.system[1])
    return pieces._replace(start=pieces.start.removeprefix(added), system=system)


def literal(text: str) -> str:
    """A text in a Modelfile's template: braces begin actions, three quotes end it, and Ollama drops what can't be printed."""

    def escaped(character: str) -> bool:
        return character in '{"' or not (character.isprintable() or character in "\n\t")

    return "".join(f'{{{{ "\\U{ord(c):08x}" }}}}' if escaped(c) else c for c in text)


def _around(name: str, texts: tuple[str, str]) -> str:
    return f"{{{{ {name} }}}}".join(map(literal, texts))


def _texts_around(chat: ChatFormat, turns: list[Turn]) -> list[str] | None:
    """What a prompt has before, between and after the contents of the turns; None unless it has each once, in order."""
    text = chat.try_render(turns, generation_prompt=True) or ""
    found = re.fullmatch("(.*)".join(["", *(re.escape(turn["content"]) for turn in turns), ""]), text, re.DOTALL)
    return list(found.groups()) if found and len(re.findall(r"@@\d@@", text)) == len(turns) else None
