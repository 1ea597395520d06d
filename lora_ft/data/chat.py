"""Chats: from turns to the chat template's text, and the spans of it that are supervised.

Supervised is what a model prompted with `add_generation_prompt` has to generate: everything after the generation prompt, up
to and including the token that ends the turn. White space after that token, such as ChatML's newline, belongs to the
template. If a template ends turns with no token, the end-of-sequence token is appended after an assistant turn that
ends the chat; otherwise the model would never learn to stop.

With most templates the text of the first turns is a prefix of the chat's text, so spans are differences of prefixes. Where
that fails (earlier thinking removed, the system prompt moved to the last user turn, no generation prompt), a marker rendered
in place of a turn's content locates it, and if that fails too, the template's own {% generation %} blocks. Otherwise the row
is bad: spans are never guessed.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import first_line, format_value, printable
from lora_ft.data.template import BadRow, check_unicode, type_in_words

Turn = dict[str, Any]
Span = tuple[int, int]  # characters, end exclusive

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
TODAY = datetime(2024, 7, 26)  # for templates that print the date: a run resumed tomorrow must see the same chats
STRFTIME = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class ChatFormat:
    """A chat template, and how its turns can end.

    template: its text. end_tokens: tokens that may end a turn. eos: the tokenizer's end-of-sequence token, or None.
    from_config: the template is data.chat_template, not the tokenizer's.
    """

    template: str
    end_tokens: frozenset[str]
    eos: str | None
    tokenizer: PreTrainedTokenizerBase
    from_config: bool

    def render(self, turns: list[Turn], generation_prompt: bool = False) -> str:
        """The text of a chat.

        Raises:
            BadRow: the template fails on these turns.
            ConfigError, ModelError: the template of the config, or of the tokenizer, has a syntax error.
        """
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateSyntaxError as e:
            where = "data.chat_template" if self.from_config else "the model's chat template"
            raise (ConfigError if self.from_config else ModelError)(f"{where}: line {e.lineno}: {e.message}") from e
        except Exception as e:  # a template is a program: raise_exception, undefined names, None + str, ...
            bare = [n for n, turn in enumerate(turns, 1) if "content" not in turn]
            hint = f" (turn {bare[0]} has tool calls and no content: does the template support tools?)" if bare else ""
            raise BadRow(f"the chat template fails: {first_line(e)}{hint}") from e

    def try_render(self, turns: list[Turn], generation_prompt: bool = False) -> str | None:
        """`render` for a part of a chat: None if the template rejects the part, which it may though the chat is valid."""
        try:
            return self.render(turns, generation_prompt)
        except BadRow:
            return None

    def ends_turn(self, text: str) -> bool:
        """Whether the text ends with an end token."""
        return text.endswith(tuple(self.end_tokens))


def chat_format(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> ChatFormat:
    """The format of `chat_template`, or if that is None of the tokenizer's own; raises ModelError if it has none."""
    try:
        text = tokenizer.get_chat_template() if chat_template is None else chat_template
    except ValueError as e:
        raise ModelError(
            "the tokenizer has no chat template, which data.messages needs: set data.chat_template to a file that "
            "contains one, or use an instruct model."
        ) from e
    text = STRFTIME.sub(lambda match: repr(TODAY.strftime(match[2])), text)
    # Some tokenizers add thousands of tokens (reserved, HTML): of those only the special ones and those in the template.
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in text}
    ends = frozenset(token for token in added | {tokenizer.eos_token or ""} if token.strip())
    return ChatFormat(text, ends, tokenizer.eos_token, tokenizer, from_config=chat_template is not None)


def read_turns(value: Any) -> list[Turn]:
    """OpenAI's role/content or ShareGPT's from/value turns, as role/content turns; raises BadRow for anything else."""
    if not isinstance(value, list) or not value:
        shown = "an empty list" if value == [] else type_in_words(value)
        raise BadRow(f"its messages are {shown}, not a list of turns with role and content, or from and value")
    return [_turn(turn, i) for i, turn in enumerate(value, 1)]


def _turn(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is {type_in_words(turn)}, not an object with role and content, or from and value")
    turn = {key: value for key, value in turn.items() if value is not None}  # Parquet fills in missing keys
    if "role" not in turn and "from" in turn:
        turn |= {"role": turn.pop("from"), "content": turn.pop("value", None)}
    if isinstance(turn.get("content"), list):
        turn["content"] = _join_parts(turn["content"], number)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise BadRow(f"turn {number} has no role (or from); it has {printable(', '.join(map(str, turn))) or 'nothing'}")
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise BadRow(f"turn {number} ({printable(role, 30)}): its content is {type_in_words(content)}, not text")
    check_unicode(content or "")
    return turn | {"role": ROLES.get(role, role)}


def _join_parts(parts: list, number: int) -> str:
    """The text of OpenAI's content parts, [{"type": "text", "text": ...}, ...]."""
    for part in parts:
        part_type = format_value(part.get("type")) if isinstance(part, dict) else None
        if part_type != '"text"' or not isinstance(part.get("text"), str):
            shown = f"of type {part_type}" if part_type else type_in_words(part)
            raise BadRow(
                f'turn {number}: a part of its content is {shown}, not {{"type": "text", "text": ...}}; only text can be '
                "trained on"
            )
    return "".join(part["text"] for part in parts)


def render_chat(turns: list[Turn], chat: ChatFormat) -> tuple[str, list[Span]]:
    """The text of a chat and the span of each assistant turn in it.

    Raises:
        BadRow: no assistant turn, a template that fails, or one whose assistant turns cannot be located.
    """
    assistant = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not assistant:
        roles = printable(", ".join(dict.fromkeys(turn["role"] for turn in turns)))
        raise BadRow(f"no assistant turn, so nothing is supervised; its roles are {roles}")
    text = chat.render(turns)
    check_unicode(text)
    spans = [span for i in assistant if (span := _locate(text, turns, i, chat))]
    if len(spans) < len(assistant):
        spans = _generation_spans(text, turns, assistant, chat)
    positions = [0] + [position for span in spans for position in span]
    if positions != sorted(positions):
        raise BadRow("the chat template renders its assistant turns out of order")
    start, end = spans[-1]
    if chat.eos and assistant[-1] == len(turns) - 1 and end == len(text) and not chat.ends_turn(text):
        text += chat.eos
        spans[-1] = start, len(text)
    return text, spans


def _locate(text: str, turns: list[Turn], i: int, chat: ChatFormat) -> Span | None:
    """The span of turn i in the chat's text, with its end token; None if it cannot be located."""
    prompt = chat.try_render(turns[:i], True) if i else None
    before = chat.try_render(turns[:i]) if i else None
    after = text if i == len(turns) - 1 else chat.try_render(turns[: i + 1])
    # The ends of the generation prompt and of the turn, where they are prefixes of the chat. Without a generation prompt,
    # the turn's header would count as the assistant's words.
    start = len(prompt) if prompt is not None and prompt != before and text.startswith(prompt) else None
    end = len(after) if after is not None and text.startswith(after) else None
    if start is None or end is None or start > end:
        content = _locate_content(text, turns, i, chat)
        if content is None:
            return None
        first, last, closing = content
        start = start if start is not None and start <= first else first
        end = end if end is not None and end >= last else last + len(commonprefix([closing, text[last:]]))
    return _trim(text, start, end, chat)


def _locate_content(text: str, turns: list[Turn], i: int, chat: ChatFormat) -> tuple[int, int, str] | None:
    """Start and end of turn i's content, and the text after it where the chat ends with turn i; located with a marker."""
    marker, content = "@@turn@@", turns[i].get("content")
    if content is None:
        return None
    while marker in text:
        marker += "@"
    marked = turns[i] | {"content": marker}
    marked_text = chat.try_render(turns[:i] + [marked] + turns[i + 1 :])
    if marked_text is None or marked_text.count(marker) != 1:
        return None
    left, _, right = marked_text.partition(marker)
    first, last = len(left), len(text) - len(right)
    if first > last or not text.startswith(left) or not text.endswith(right):
        return None
    if text[first:last].strip() not in content:  # a template may strip content and drop thinking, but not rewrite
        return None
    ending = chat.try_render(turns[:i] + [marked]) or ""
    return first, last, ending.rpartition(marker)[2] if marker in ending else ""


def _generation_spans(text: str, turns: list[Turn], assistant: list[int], chat: ChatFormat) -> list[Span]:
    """The template's own {% generation %} spans, extended by the token that ends the turn."""
    failure = BadRow(
        "cannot locate the assistant's turns in the chat template's text: its text for the first turns is not a prefix of "
        "its text for all, it rewrites contents, and it has no {% generation %} around each assistant turn"
    )
    if not re.search(r"\{%-?\s*generation\s*-?%\}", chat.template):
        raise failure

    def render_marked(part: list[Turn]) -> tuple[str, list[Span]]:
        options = {"chat_template": chat.template, "return_assistant_tokens_mask": True}
        texts, spans = render_jinja_template([part], **options, **chat.tokenizer.special_tokens_map)
        return texts[0], spans[0]

    marked_text, spans = render_marked(turns)
    if marked_text != text or len(spans) != len(assistant):
        raise failure
    closing = ""
    if chat.try_render(turns[: assistant[-1] + 1]) is not None:
        ending, ending_spans = render_marked(turns[: assistant[-1] + 1])
        closing = ending[ending_spans[-1][1] :] if ending_spans else ""
    return [_trim(text, start, end + len(commonprefix([closing, text[end:]])), chat) for start, end in spans]


def _trim(text: str, start: int, end: int, chat: ChatFormat) -> Span:
    """The span without white space after its end token."""
    stripped = text[start:end].rstrip()
    return (start, start + len(stripped)) if chat.ends_turn(stripped) else (start, end)
