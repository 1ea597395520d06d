"""What a person asks, as the prompt that an adapter knows from its training.

An adapter trained on "Review: {text}\\nSentiment:" answers well to that and badly to anything else, so what is asked goes
through the template of its run: a text where the template has one column, a row where the row has the template's columns,
turns through the chat template. A base, or an adapter without a record, is asked through the model's chat template where it
has one, else with the text as it is; so is every text with `raw`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ft.config.load import DataConfig
from lora_ft.core.errors import DataError, ModelError
from lora_ft.core.messages import printable
from lora_ft.core.names import template_columns
from lora_ft.data.chat import ChatFormat, Turn, chat_format, read_turns
from lora_ft.data.delimited import text_lines
from lora_ft.data.prepare import template_of
from lora_ft.data.sources import SourceRow, iter_rows
from lora_ft.data.template import BadRow, Template, check_unicode, renderer
from lora_ft.data.tokens import TextEncoder, text_encoder

USER, ASSISTANT = "user", "assistant"


@dataclass(frozen=True)
class Form:
    """How one adapter is asked.

    template: its run's; without prompt and messages, a text is the prompt itself. chat: the chat template, where there is
    one. talks: a text is a turn of a chat.
    """

    template: Template
    chat: ChatFormat | None
    talks: bool
    encoder: TextEncoder

    def of_text(self, text: str, before: list[Turn] | None = None) -> tuple[str, list[int]]:
        """The prompt for a text, after the turns before it where this is a chat: as text, and as token ids.

        Raises:
            BadRow: the template has more columns than one, or none.
        """
        if self.talks:
            return self.of_turns([*(before or []), {"role": USER, "content": text}])
        if self.template.prompt is not None:
            columns = template_columns(self.template.prompt)
            if len(columns) != 1:
                there = ", ".join(columns) or "none"
                raise BadRow(
                    f"the run's template takes the columns {there}, and a text alone can't fill them: give rows with them "
                    "(--prompts FILE.jsonl), or the whole prompt as it is with --raw"
                )
            return self.of_columns({columns[0]: text})
        return self._plain(text)

    def of_columns(self, columns: dict[str, Any]) -> tuple[str, list[int]]:
        """The prompt for a row's columns through the run's template. Raises BadRow."""
        assert self.template.prompt is not None
        return self._plain(renderer("prompt", self.template.prompt, self.template.label_names or {})(columns))

    def of_turns(self, turns: list[Turn]) -> tuple[str, list[int]]:
        """The prompt for a chat, up to where the assistant speaks. Raises BadRow."""
        if self.chat is None:
            raise BadRow("the model has no chat template for messages: give a prompt")
        text = self.chat.render(turns, generation_prompt=True)
        check_unicode(text)
        return text, self.encoder.encode_bare(text)

    def of_row(self, columns: dict[str, Any]) -> tuple[str, list[int]]:
        """The prompt for a row: its turns, or its columns through the run's template, or its `prompt`. Raises BadRow.

        Turns that end with the assistant's are a chat with its answer, which is left out: it is what is asked for.
        """
        turns = next((columns[c] for c in (self.template.messages, "messages") if c and columns.get(c)), None)
        wanted = template_columns(self.template.prompt) if self.template.prompt is not None else ()
        if wanted and all(column in columns for column in wanted):
            return self.of_columns(columns)
        if turns is not None:
            read = read_turns(turns)
            return self.of_turns(read[:-1] if read[-1]["role"] == ASSISTANT else read)
        if isinstance(columns.get("prompt"), str):
            return self.of_text(columns["prompt"])
        needed = " or ".join(dict.fromkeys(['"prompt"', f'"{self.template.messages or "messages"}"']))
        needed = f"{needed}, or the template's {', '.join(wanted)}" if wanted else needed
        raise BadRow(f"a row needs {needed}; this one has {printable(', '.join(map(str, columns))) or 'nothing'}")

    def ends(self) -> list[str]:
        """Tokens after which the answer is over, beside the model's own: the one that closes a turn of the chat template.

        A model trained on turns that end in <|im_end|> says that, even if its end-of-sequence token is another.
        """
        if self.chat is None:
            return []
        mark = "@@turn@@"
        text = self.chat.try_render([{"role": USER, "content": "a"}, {"role": ASSISTANT, "content": mark}]) or ""
        closing = text.rpartition(mark)[2].lstrip()
        return [token for token in self.chat.end_tokens if closing.startswith(token)]

    def _plain(self, text: str) -> tuple[str, list[int]]:
        check_unicode(text)
        if not text:
            raise BadRow("the prompt is empty")
        return text, self.encoder.encode_prompts([text])[0]


def form_of(data: DataConfig | None, tokenizer: PreTrainedTokenizerBase, raw: bool) -> Form:
    """The form of a run's `data` section, or of what has none.

    Raises:
        ConfigError: the run's chat template is a file that isn't there. ModelError: a chat run, and no chat template.
    """
    template = template_of(data) if data else Template()
    if raw:
        template = Template(chat_template=template.chat_template)
    try:
        chat = chat_format(tokenizer, template.chat_template)
    except ModelError:
        if template.messages:
            raise
        chat = None
    talks = chat is not None and not raw and template.prompt is None and template.text is None
    return Form(template, chat, talks, replace(text_encoder(tokenizer), eos=[]))


def read_prompts(source: str) -> Iterator[SourceRow]:
    """The rows of a prompts file; a .txt file has a prompt on every line that isn't blank.

    Raises:
        DataError: as `iter_rows`.
    """
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
