"""A user's text, row or chat as a prompt in the format that an adapter was trained on.

An adapter trained on "Review: {text}\\nSentiment:" answers well to that and badly to anything else, so inputs go through the
template of its run: a text fills a template with one column, a row one whose columns it has, turns go through the chat
template. For a base, or an adapter without a record, that is the model's chat template, or else the text unchanged; with
`raw` a text is never changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.core.errors import DataError, ModelError
from lora_ft.core.messages import printable
from lora_ft.core.names import template_columns
from lora_ft.data.chats.format import ChatFormat, chat_format
from lora_ft.data.chats.turns import Turn, read_prompt
from lora_ft.data.delimited import text_lines
from lora_ft.data.prepare import template_of
from lora_ft.data.sources import SourceRow, iter_rows
from lora_ft.data.template import BadRow, Template, check_unicode, renderer
from lora_ft.data.tokens import TextEncoder, text_encoder

USER, ASSISTANT = "user", "assistant"


@dataclass(frozen=True)
class PromptFormat:
    """How prompts for one adapter are made; every prompt is a text and its token ids.

    template: of its run; without prompt and messages a text is the prompt itself. chat: the chat template, if there is one.
    is_chat: a text is the user's turn of a chat.
    """

    template: Template
    chat: ChatFormat | None
    is_chat: bool
    encoder: TextEncoder

    @property
    def written_markers(self) -> str:
        """The template whose special tokens are part of an answer, see `to_text`; "" where answers are plain texts."""
        return self.chat.template if self.chat and self.is_chat else ""

    def from_text(self, text: str, turns: Sequence[Turn] = ()) -> tuple[str, list[int]]:
        """The prompt for a text, in a chat after its previous `turns`; a BadRow if the template has not exactly one column."""
        if self.is_chat:
            return self.from_turns([*turns, {"role": USER, "content": text}])
        if self.template.prompt is None:
            return self._encode(text)
        columns = template_columns(self.template.prompt)
        if len(columns) != 1:
            raise BadRow(
                f"the run's template takes the columns {', '.join(columns) or 'none'}, which a text alone can't fill: give "
                "rows with them (--prompts FILE.jsonl), or a complete prompt with --raw"
            )
        return self.from_columns({columns[0]: text})

    def from_columns(self, columns: dict[str, Any]) -> tuple[str, list[int]]:
        """The prompt for a row's columns through the run's template; a BadRow if one is missing or empty."""
        assert self.template.prompt is not None
        return self._encode(renderer("prompt", self.template.prompt, self.template.label_names or {})(columns))

    def from_turns(self, turns: list[Turn], tools: list[dict] | None = None) -> tuple[str, list[int]]:
        """The prompt for a chat, up to the start of the assistant's turn; a BadRow if the chat template refuses the turns."""
        if self.chat is None:
            raise BadRow("the model has no chat template for messages: give a prompt")
        text = self.chat.render(turns, tools, generation_prompt=True)
        check_unicode(text)
        return text, self.encoder.encode_bare(text)

    def from_row(self, columns: dict[str, Any]) -> tuple[str, list[int]]:
        """The prompt for a row: its columns through the run's template, or its turns, or its `prompt`; else a BadRow.

        A final turn of the assistant is the expected answer and is left out.
        """
        needed = template_columns(self.template.prompt) if self.template.prompt is not None else ()
        if needed and all(column in columns for column in needed):
            return self.from_columns(columns)
        column = next((c for c in (self.template.messages, "messages") if c and columns.get(c)), None)
        if column is not None:
            return self.from_turns(*read_prompt(columns, column, self.template.roles))
        if isinstance(columns.get("prompt"), str):
            return self.from_text(columns["prompt"])
        choices = " or ".join(dict.fromkeys(['"prompt"', f'"{self.template.messages or "messages"}"']))
        choices += f", or the template's {', '.join(needed)}" if needed else ""
        raise BadRow(f"a row needs {choices}; this one has {printable(', '.join(map(str, columns))) or 'nothing'}")

    def describe(self) -> str:
        """How a text becomes a prompt, in a few words."""
        if self.is_chat:
            return "a chat through the chat template"
        if self.template.prompt is not None:
            return f"each line fills the run's template {printable(repr(self.template.prompt), 60)}, by itself"
        return "each line is a complete prompt, by itself"

    def _encode(self, text: str) -> tuple[str, list[int]]:
        check_unicode(text)
        if not text:
            raise BadRow("the prompt is empty")
        return text, next(self.encoder.encode_prompts([text]))


def prompt_format(config: Config | None, tokenizer: PreTrainedTokenizerBase, raw: bool) -> PromptFormat:
    """The prompt format of a run's config; None for a base or an adapter without one.

    Raises ConfigError as `template_of`; ModelError if the run was trained on chats, but there is no chat template.
    """
    template = template_of(config.data) if config else Template()
    if raw:
        template = Template(chat_template=template.chat_template, chat_template_kwargs=template.chat_template_kwargs)
    try:
        chat = chat_format(tokenizer, template.chat_template, template.chat_template_kwargs)
    except ModelError:
        if template.messages:
            raise
        chat = None
    is_chat = chat is not None and not raw and template.prompt is None and template.text is None
    return PromptFormat(template, chat, is_chat, replace(text_encoder(tokenizer), eos=[]))


def read_prompts(source: str) -> Iterator[SourceRow]:
    """The rows of a prompts file, as of `iter_rows`; in a .txt file every line that is not blank is a prompt."""
    path = Path(source).expanduser()
    if path.suffix.lower() != ".txt":
        yield from iter_rows(source)
        return
    try:
        for number, line in enumerate(text_lines(path), 1):
            if line.strip():
                yield SourceRow(f"{printable(str(path))}:{number}", {"prompt": line.rstrip("\r\n")})
    except OSError as e:
        raise DataError(f"{printable(str(path))}: can't be read: {e.strerror or e}.") from e
