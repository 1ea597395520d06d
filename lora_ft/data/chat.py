"""Chats: from turns to the chat template's text and the spans of it that the assistant says.

What the assistant says is what a model asked with `add_generation_prompt` has to generate: everything after the
generation prompt up to and including the turn's end token. White space after an end token, such as ChatML's newline,
belongs to the template. A template whose turns end in no token is given the end-of-sequence token after the last
assistant turn, if that is the end of the chat: otherwise the model would never learn to stop.

Most templates render the turns up to here as the beginning of the whole chat, so spans are differences of prefixes.
Where that fails (earlier thinking stripped, the system prompt moved to the last user turn, no generation prompt), a
turn's content is found by rendering a marker in its place; and if that fails too, by the template's own {% generation
%}. Otherwise the row is bad: never a guess.
"""

import os.path
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import first_line, format_value, printable
from lora_ft.data.template import BadRow, check_unicode, kind

Turn = dict[str, Any]
Span = tuple[int, int]  # characters, end exclusive

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
TODAY = datetime(2024, 7, 26)  # for templates that write the date: a run gone on tomorrow sees the same chats
STRFTIME = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class ChatFormat:
    """template: the chat template's text. end_tokens: those that can end a turn. eos: the tokenizer's, or None."""

    template: str
    end_tokens: frozenset[str]
    eos: str | None
    tokenizer: PreTrainedTokenizerBase
    own: bool  # the config's template, not the tokenizer's

    def render(self, turns: list[Turn], generation_prompt: bool = False) -> str:
        """The chat as text. Raises BadRow with the template's own message."""
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateSyntaxError as e:
            where = "data.chat_template" if self.own else "the model's chat template"
            raise (ConfigError if self.own else ModelError)(f"{where}: line {e.lineno}: {e.message}") from e
        except Exception as e:  # a template is a program: raise_exception, undefined names, None + str, ...
            bare = [n for n, turn in enumerate(turns, 1) if "content" not in turn]
            hint = f" (turn {bare[0]} has tool calls and no content: does the template know tools?)" if bare else ""
            raise BadRow(f"the chat template fails: {first_line(e)}{hint}") from e

    def attempt(self, turns: list[Turn], generation_prompt: bool = False) -> str | None:
        """`render` of a part of a chat, which a template may refuse though it takes the whole: None then."""
        try:
            return self.render(turns, generation_prompt)
        except BadRow:
            return None

    def ends_turn(self, text: str) -> bool:
        """Whether the text ends in an end token."""
        return any(text.endswith(token) for token in self.end_tokens)


def chat_format(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> ChatFormat:
    """The config's chat template, or else the tokenizer's.

    Raises:
        ModelError: neither.
    """
    try:
        text = tokenizer.get_chat_template() if chat_template is None else chat_template
    except ValueError as e:
        raise ModelError(
            "the tokenizer has no chat template, which data.messages needs: name a file with one in "
            "data.chat_template, or use an instruct model."
        ) from e
    text = STRFTIME.sub(lambda match: repr(TODAY.strftime(match[2])), text)
    # Any added token that the template could write; of thousands (reserved and HTML ones) only what its text names,
    # or what is special.
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in text}
    ends = frozenset(token for token in added | {tokenizer.eos_token or ""} if token.strip())
    return ChatFormat(text, ends, tokenizer.eos_token, tokenizer, own=chat_template is not None)


def read_turns(value: Any) -> list[Turn]:
    """OpenAI's role/content or ShareGPT's from/value turns, as role/content. Raises BadRow."""
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind(value)
        raise BadRow(f"its messages are {what}, not a list of turns with role and content, or from and value")
    return [_turn(turn, i) for i, turn in enumerate(value, 1)]


def _turn(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is {kind(turn)}, not an object with role and content, or from and value")
    turn = {key: value for key, value in turn.items() if value is not None}  # what Parquet fills in
    if "role" not in turn and "from" in turn:
        turn |= {"role": turn.pop("from"), "content": turn.pop("value", None)}
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined(turn["content"], number)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise BadRow(f"turn {number} has no role (or from); it has {printable(', '.join(map(str, turn))) or 'nothing'}")
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise BadRow(f"turn {number} ({printable(role, 30)}): its content is {kind(content)}, not text")
    check_unicode(content or "")
    return turn | {"role": ROLES.get(role, role)}


def _joined(parts: list, number: int) -> str:
    """The text of OpenAI's content parts, [{"type": "text", "text": ...}, ...]."""
    for part in parts:
        of_type = format_value(part.get("type")) if isinstance(part, dict) else None
        if of_type != '"text"' or not isinstance(part.get("text"), str):
            what = f"of type {of_type}" if of_type else kind(part)
            raise BadRow(
                f'turn {number}: a part of its content is {what}, not {{"type": "text", "text": ...}}; only text can be '
                "trained on"
            )
    return "".join(part["text"] for part in parts)


def render_chat(turns: list[Turn], chat: ChatFormat) -> tuple[str, list[Span]]:
    """The whole chat's text and the span of each assistant turn in it.

    Raises:
        BadRow: no assistant turn, a template that fails, or one whose assistant turns can't be told apart.
    """
    said = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not said:
        roles = printable(", ".join(dict.fromkeys(turn["role"] for turn in turns)))
        raise BadRow(f"no assistant turn, so nothing is supervised; its roles are {roles}")
    text = chat.render(turns)
    check_unicode(text)
    spans = [_span(text, turns, i, chat) for i in said]
    found = [span for span in spans if span is not None]
    if len(found) < len(spans):
        found = _generation_spans(text, turns, said, chat)
    ordered = [0] + [position for span in found for position in span]
    if ordered != sorted(ordered):
        raise BadRow("the chat template renders its assistant turns out of order")
    start, end = found[-1]
    if chat.eos and said[-1] == len(turns) - 1 and end == len(text) and not chat.ends_turn(text):
        text += chat.eos
        found[-1] = start, len(text)
    return text, found


def _span(text: str, turns: list[Turn], i: int, chat: ChatFormat) -> Span | None:
    """Where turn i's words are in the whole chat's text, its end token included; None if they can't be told."""
    before = chat.attempt(turns[:i], True) if i else None
    bare = chat.attempt(turns[:i]) if i else None
    after = text if i == len(turns) - 1 else chat.attempt(turns[: i + 1])
    # Where the whole chat has the generation prompt's end and the turn's. Without a generation prompt of its own, the
    # turn's header would count as the assistant's words.
    start = len(before) if before is not None and before != bare and text.startswith(before) else None
    end = len(after) if after is not None and text.startswith(after) else None
    if start is None or end is None or start > end:
        content = _content(text, turns, i, chat)
        if content is None:
            return None
        first, last, closing = content
        start = start if start is not None and start <= first else first
        end = end if end is not None and end >= last else last + _shared(closing, text[last:])
    return _trimmed(text, start, end, chat)


def _content(text: str, turns: list[Turn], i: int, chat: ChatFormat) -> tuple[int, int, str] | None:
    """Where turn i's content begins and ends, and how the template closes a chat after it; found with a marker."""
    content = turns[i].get("content")
    if content is None:
        return None
    marker = "@@turn@@"
    while marker in text:
        marker += "@"
    marked = turns[i] | {"content": marker}
    whole = chat.attempt(turns[:i] + [marked] + turns[i + 1 :])
    if whole is None or whole.count(marker) != 1:
        return None
    left, _, right = whole.partition(marker)
    first, last = len(left), len(text) - len(right)
    if first > last or not text.startswith(left) or not text.endswith(right):
        return None
    if text[first:last].strip() not in content:  # a template may strip, and leave thinking out, but not rewrite
        return None
    alone = chat.attempt(turns[:i] + [marked])
    return first, last, alone.rpartition(marker)[2] if alone and marker in alone else ""


def _generation_spans(text: str, turns: list[Turn], said: list[int], chat: ChatFormat) -> list[Span]:
    """What the template itself marks with {% generation %}, extended by the turn's end token."""
    failure = BadRow(
        "can't tell which part of the chat template's text the assistant says: its text for the first turns isn't how "
        "the whole chat begins, it rewrites contents, and it has no {% generation %} around each assistant turn"
    )
    if not re.search(r"\{%-?\s*generation\s*-?%\}", chat.template):
        raise failure
    special = chat.tokenizer.special_tokens_map

    def marked(part: list[Turn]) -> tuple[str, list[Span]]:
        texts, spans = render_jinja_template(
            [part], chat_template=chat.template, return_assistant_tokens_mask=True, **special
        )
        return texts[0], spans[0]

    whole, spans = marked(turns)
    if whole != text or len(spans) != len(said):
        raise failure
    closing = ""
    if chat.attempt(turns[: said[-1] + 1]) is not None:
        alone, its_spans = marked(turns[: said[-1] + 1])
        closing = alone[its_spans[-1][1] :] if its_spans else ""
    ends = [end + _shared(closing, text[end:]) for _, end in spans]
    return [_trimmed(text, start, end, chat) for (start, _), end in zip(spans, ends, strict=True)]


def _trimmed(text: str, start: int, end: int, chat: ChatFormat) -> Span:
    """The span without white space after its end token."""
    words = text[start:end].rstrip()
    return (start, start + len(words)) if chat.ends_turn(words) else (start, end)


def _shared(one: str, other: str) -> int:
    """Length of their common beginning."""
    return len(os.path.commonprefix([one, other]))
