"""A user's text, row or chat as a prompt in the format that an adapter was trained on.

An adapter trained on "Review: {text}\\nSentiment:" answers well to that and badly to anything else, so inputs go through the
template of its run: a text fills the template's main column, a row one whose columns it has, turns go through the chat
template. For a base, or an adapter without a record, that is the model's chat template, or else the text unchanged; with
`raw` a text is never changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.core.errors import DataError, ModelError
from lora_ft.core.messages import printable
from lora_ft.core.names import template_columns
from lora_ft.core.paths import local_path, refuse_special
from lora_ft.data.chats.format import ChatFormat, chat_format
from lora_ft.data.chats.raw_turns import asked_messages, message_columns
from lora_ft.data.chats.turns import Turn, read_prompt
from lora_ft.data.files import file_format, text_lines
from lora_ft.data.pieces import as_ids
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

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template takes, optional ones too."""
        return template_columns(self.template.prompt or "")

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that the template can't do without."""
        return template_columns(self.template.prompt or "", optional=False)

    def open_columns(self, given: Mapping[str, str]) -> list[str]:
        """The columns that a text fills when others are `given`: the needed ones, else the first that there is."""
        return [c for c in self.needed if c not in given] or [c for c in self.columns if c not in given][:1]

    def from_text(
        self, text: str, turns: Sequence[Turn] = (), given: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[str, list[int]]:
        """The prompt for a text, in a chat after its previous `turns`.

        The text fills the only needed column that is not in `given`; BadRow if there are several.
        """
        if self.is_chat:
            return self.from_turns([*turns, {"role": USER, "content": text}])
        if self.template.prompt is None:
            return self._encode(text)
        match self.open_columns(given):
            case [column]:
                return self.from_columns({**given, column: text})
            case []:
                has = f"the columns {', '.join(self.columns)}, which are all given" if self.columns else "no columns"
                raise BadRow(f"the run's template takes {has}: there is none for this text")
            case several:
                raise BadRow(
                    f"the run's template takes the columns {', '.join(several)}, which a text alone can't fill: give all "
                    f"but one with --column {printable(several[0])}=TEXT (in a chat: /set {printable(several[0])}=TEXT), or "
                    "rows with them (--prompts FILE.jsonl), or a complete prompt with --raw"
                )

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
        return text, self.encoder.encode_bare(text).tolist()

    def takes(self, columns: dict[str, Any], given: Mapping[str, str]) -> bool:
        """Whether `from_row` finds in a row what it needs for a prompt."""
        is_chat = self.chat is not None and asked_messages(columns, self.template.messages) is not None
        return is_chat or self._fills_template(columns, given) or isinstance(columns.get("prompt"), str)

    def _fills_template(self, columns: dict[str, Any], given: Mapping[str, str]) -> bool:
        there = {
            c for c in self.columns if c in columns or c.partition("[")[0] in columns
        }  # answers of answers[text][0]
        return bool(there) and there.union(given).issuperset(self.needed)

    def from_row(
        self, columns: dict[str, Any], given: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[str, list[int]]:
        """The prompt for a row: its columns through the run's template, or its turns, or its `prompt`; else a BadRow.

        The row's own values go before the `given` ones. A final turn of the assistant is the expected answer and is left out.
        """
        if self._fills_template(columns, given):
            return self.from_columns({**given, **columns})
        if (messages := asked_messages(columns, self.template.messages)) is not None:
            return self.from_turns(*read_prompt(columns, messages, self.template.roles))
        if isinstance(columns.get("prompt"), str):
            return self.from_text(columns["prompt"], given=given)
        asked = self.template.messages or "messages"
        turns = ", ".join(message_columns(asked if isinstance(asked, str) else asked[:-1]))
        choices = " or ".join(dict.fromkeys(['"prompt"', f'"{turns}"']))
        choices += f", or the template's {', '.join(self.needed or self.columns)}" if self.columns else ""
        has = printable(", ".join(map(str, columns))) or "nothing"
        hint = (
            '. The run learned whole texts: give in "prompt" how one begins' if self.template.text is not None else ""
        )
        raise BadRow(f"a row needs {choices}; this one has {has}{hint}")

    def describe(self, given: Mapping[str, str]) -> str:
        """How a text becomes a prompt, in a few words."""
        if self.is_chat:
            return "a chat through the chat template"
        if self.template.prompt is not None:
            filled = self.open_columns(given)
            others = [column for column in self.columns if column not in filled[:1] and column not in given]
            fills = f"{filled[0]} of " if len(filled) == 1 and len(self.columns) > 1 else ""
            hint = f"; /set {'=TEXT, /set '.join(others)}=TEXT" if others else ""
            hint += f" (all but one of {', '.join(filled)} are needed first)" if len(filled) > 1 else ""
            template = printable(repr(self.template.prompt), 60)
            return f"each line fills {fills}the run's template {template}, by itself" + printable(hint)
        return "each line is a complete prompt, by itself"

    def _encode(self, text: str) -> tuple[str, list[int]]:
        check_unicode(text)
        if not text:
            raise BadRow("the prompt is empty")
        return text, next(self.encoder.encode_prompts([text])).tolist()


def prompt_format(
    config: Config | None, tokenizer: PreTrainedTokenizerBase, raw: bool, other: PromptFormat | None = None
) -> PromptFormat:
    """The prompt format of a run's config; None for a base or an adapter without one.

    other: a format with the same tokenizer, whose copies of it are shared: half a second, and tens of megabytes.

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
    encoder = other.encoder if other else replace(text_encoder(tokenizer), eos=as_ids(()))
    return PromptFormat(template, chat, is_chat, encoder)


def read_prompts(source: str, config: Config | None) -> Iterator[SourceRow]:
    """The rows of a prompts file, as of `iter_rows`; in a .txt file every line that is not blank is a prompt.

    config: of the run, whose `data.format` reads a file that cannot be read without one.
    """
    path = local_path(source)
    refuse_special(path, DataError)
    if path.suffix.lower() != ".txt":
        try:
            rows = list(iter_rows(source))
        except DataError:
            if config is None or not config.data.format:
                raise
            rows = list(iter_rows(source, file_format(config.data.format)))
        yield from rows
        return
    try:
        for number, line in enumerate(text_lines(path), 1):
            if line.strip():
                yield SourceRow(f"{printable(str(path))}:{number}", {"prompt": line.rstrip("\r\n")})
    except OSError as e:
        raise DataError(f"{printable(str(path))}: can't be read: {e.strerror or e}.") from e
