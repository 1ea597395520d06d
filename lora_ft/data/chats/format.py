"""Chat templates: rendering turns as one of them expects them, and the tokens that end its turns."""

import bisect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import first_line
from lora_ft.data.chats.dialect import Dialect, calling, for_template
from lora_ft.data.chats.turns import Turn
from lora_ft.data.template import BadRow

Span = tuple[int, int]  # characters, end exclusive

TODAY = datetime(2024, 7, 26)  # for templates that print the date: a run resumed tomorrow must see the same chats
STRFTIME = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
WRITTEN_MARKERS = r"<\|[^\s<>|]+\|>|<｜[^\s<>]+｜>|</?[a-z_]+>"  # in a template's text, whether or not they are tokens
PROBE, USER = "@@731@@", {"role": "user", "content": "@@user@@"}  # a template may change case


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with its settings.

    template: its text. kwargs: data.chat_template_kwargs. from_config: the template is data.chat_template, not the
    tokenizer's.
    """

    template: str
    tokenizer: PreTrainedTokenizerBase
    from_config: bool
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def render(self, turns: list[Turn], tools: list[dict] | None = None, generation_prompt: bool = False) -> str:
        """The text of a chat.

        Raises:
            BadRow: the template fails on these turns.
            ConfigError, ModelError: the template of the config, or of the tokenizer, has a syntax error.
        """
        return self._render(turns, tools, self.dialect, generation_prompt)

    def try_render(
        self, turns: list[Turn], tools: list[dict] | None = None, generation_prompt: bool = False
    ) -> str | None:
        """`render` for a part of a chat: None if the template rejects the part, which it may though the chat is valid."""
        return self._try(turns, tools, self.dialect, generation_prompt)

    def generation_spans(self, turns: list[Turn], tools: list[dict] | None) -> tuple[str, list[Span]]:
        """The text of a chat, and the spans of it that the template marks with {% generation %}; ("", []) if it marks none."""
        if not GENERATION.search(self.template):
            return "", []
        options = {"chat_template": self.template, "tools": tools, "return_assistant_tokens_mask": True}
        turns = [for_template(turn, self.dialect) for turn in turns]
        texts, spans = render_jinja_template([turns], **options, **self.tokenizer.special_tokens_map, **self.kwargs)
        return texts[0], spans[0]

    def _render(self, turns: list[Turn], tools: list[dict] | None, dialect: Dialect, generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [for_template(turn, dialect) for turn in turns],
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.kwargs,
            )
        except jinja2.TemplateSyntaxError as e:
            where = "data.chat_template" if self.from_config else "the model's chat template"
            raise (ConfigError if self.from_config else ModelError)(f"{where}: line {e.lineno}: {e.message}") from e
        except Exception as e:  # a template is a program: raise_exception, undefined names, None + str, ...
            raise BadRow(f"the chat template fails: {first_line(e)}") from e

    def _try(
        self, turns: list[Turn], tools: list[dict] | None, dialect: Dialect, generation_prompt: bool = False
    ) -> str | None:
        try:
            return self._render(turns, tools, dialect, generation_prompt)
        except (BadRow, ConfigError, ModelError):
            return None

    @cached_property
    def dialect(self) -> Dialect:
        """How the template reads turns: the first dialect in which nothing of a small chat is missing."""

        def shows(turns: list[Turn], dialect: Dialect, *words: str) -> bool:
            text = self._try(turns, None, dialect) or ""
            return all(word in text for word in words) and "{'@@key@@'" not in text  # Python's repr of an object

        plain = [USER, {"role": "assistant", "content": PROBE}]
        parts = not shows(plain, Dialect(), PROBE) and shows(plain, Dialect(parts=True), PROBE)
        turns: list[Turn] = [USER, calling("@@value@@")]
        result: Turn = {"role": "tool", "name": "@@name@@", "tool_call_id": "call00000", "content": "@@result@@"}
        for text_arguments, no_content in product((False, True), repeat=2):
            dialect = Dialect(parts, no_content, text_arguments)
            if any(shows(chat, dialect, "@@name@@", "@@key@@", "@@value@@") for chat in (turns, [*turns, result])):
                return dialect
        return Dialect(parts)

    @cached_property
    def header(self) -> str:
        """What the generation prompt adds to a chat that ends with the user's turn."""
        before, prompt = self.try_render([USER]) or "", self.try_render([USER], generation_prompt=True) or ""
        return prompt[self.agreement(before, prompt) :]

    def agreement(self, a: str, b: str) -> int:
        """The length of the start that two texts share, without a marker that is cut in one of them."""
        length = bisect.bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])
        cut = (
            m.start() for text in (a, b) for m in self.markers.finditer(text, max(length - 100, 0)) if m.end() > length
        )
        return min(length, *cut, length)

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """Matches one marker: an added token of the tokenizer, or a tag in the template's text."""
        # Some tokenizers add thousands of tokens (reserved, HTML): of those only the special ones and those in the template.
        added = {
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special or t.content in self.template
        }
        words = added | set(re.findall(WRITTEN_MARKERS, self.template)) | {self.tokenizer.eos_token or ""}
        # in the same order in every process: the pattern is part of the key under which the texts are cached
        longest_first = sorted(filter(str.strip, words), key=lambda word: (-len(word), word))
        return re.compile("|".join(map(re.escape, longest_first)) or "$^")

    @cached_property
    def stops(self) -> frozenset[str]:
        """The markers after which an answer at the end of a chat is complete."""
        return frozenset(self._closings[0])

    @cached_property
    def ends(self) -> frozenset[str]:
        """The markers that end an assistant's turn, anywhere in a chat; some templates end the last one differently."""
        stops, between = self._closings
        return frozenset(stops | between | {self.tokenizer.eos_token or ""} - {""})

    @cached_property
    def _closings(self) -> tuple[set[str], set[str]]:
        """(markers that close an assistant's turn at the end of a chat, those that close it before another turn).

        What follows the last words of a turn closes it, unless it is the next turn's header: then it differs before turns
        of different roles. A turn that ends with a tool call may be closed by another marker, as by gpt-oss's <|call|>; a
        marker that occurs once for every call, as GLM's </tool_call>, closes the call.
        """
        said: Turn = {"role": "assistant", "content": PROBE}
        next_turns = ({"role": role, "content": "@@next@@"} for role in ("user", "assistant", "system"))
        stops = set(self._markers_after(USER, said, directly=True)[:1])
        between = [m for turn in next_turns for m in self._markers_after(USER, said, turn, directly=True)[:1]]
        after_call = self._markers_after(USER, calling(PROBE))
        if after_call and not stops.intersection(after_call):
            after_two = self._markers_after(USER, calling(PROBE, "again"))
            if after_two.count(after_call[-1]) <= after_call.count(after_call[-1]):
                stops.add(after_call[-1])
        return stops, {m for m in between if between.count(m) > 1 and m not in self.header}

    def _markers_after(self, *turns: Turn, directly: bool = False) -> list[str]:
        """The markers that a chat's text has after PROBE; directly: only if one follows it at once, or after white space."""
        rest = (self.try_render(list(turns)) or "").partition(PROBE)[2].strip()
        return self.markers.findall(rest) if not directly or self.markers.match(rest) else []

    @cached_property
    def next_marker(self) -> re.Pattern[str]:
        """Matches white space and the marker after it, which is group 1."""
        return re.compile(rf"\s*({self.markers.pattern})")

    @cached_property
    def _tokens(self) -> set[str]:
        return {*self.tokenizer.get_added_vocab(), self.tokenizer.eos_token}

    def is_token(self, marker: str) -> bool:
        """Whether a marker is a token of its own."""
        return marker in self._tokens

    @cached_property
    def reasoning_close(self) -> str:
        """What the template writes between a turn's reasoning and its content, without white space around it: </think>."""
        text = self.try_render([USER, {"role": "assistant", "content": "@@said@@", "reasoning": PROBE}]) or ""
        return text.partition(PROBE)[2].partition("@@said@@")[0].strip() if PROBE in text and "@@said@@" in text else ""

    @cached_property
    def advice(self) -> dict[tuple, str]:
        """What was found out for kinds of turns whose generation prompt differs from the chat's text."""
        return {}

    def with_switch(self, name: str, value: bool) -> "ChatFormat":
        """The same with one more of `kwargs`."""
        return ChatFormat(self.template, self.tokenizer, self.from_config, {**self.kwargs, name: value})


def chat_format(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, kwargs: Mapping[str, Any] | None = None
) -> ChatFormat:
    """The format of `chat_template`, or if that is None of the tokenizer's own; raises ModelError if it has none."""
    try:
        text = tokenizer.get_chat_template() if chat_template is None else chat_template
    except ValueError as e:
        raise ModelError(
            "the tokenizer has no chat template, which data.messages needs: set data.chat_template to a file that "
            "contains one, or use an instruct model."
        ) from e
    text = STRFTIME.sub(lambda match: repr(TODAY.strftime(match[2])), text)
    return ChatFormat(text, tokenizer, chat_template is not None, dict(kwargs or {}))


def find_chat_format(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> ChatFormat | None:
    """`chat_format`, or None where there is no chat template."""
    return chat_format(tokenizer, chat_template, kwargs) if chat_template or tokenizer.chat_template else None


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, chat: ChatFormat | None) -> set[int]:
    """The ids that end an answer.

    They are the tokenizer's end-of-sequence token, those of the base's generation config, and the tokens that close an
    assistant's turn in the chat template: a model trained on turns that end in <|im_end|> writes that token, even if the
    tokenizer's end of sequence is another one.
    """
    listed = config.eos_token_id
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    ids |= (
        {tokenizer.convert_tokens_to_ids(marker) for marker in chat.stops if chat.is_token(marker)} if chat else set()
    )
    return {i for i in ids if i is not None}
