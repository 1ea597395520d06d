"""The turns of a chat that `lora-ft check` shows."""

import itertools
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from lora_ft.config.schema import DataConfig
from lora_ft.data.chats.render import turn_starts
from lora_ft.data.files import file_format
from lora_ft.data.prepare import find_chat, template_of
from lora_ft.data.sources import iter_rows


def chat_turns(example: Mapping, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """(kind of turn, where it starts in the chat's text) for an example of the training data, read from its row again.

    Of one that was cut none: its text is another one.
    """
    if example["truncated"]:
        return []
    chat = find_chat(data, tokenizer)
    assert chat is not None
    rows = itertools.chain.from_iterable(iter_rows(source, file_format(data.format)) for source in data.train)
    _, columns, _ = next(itertools.islice(rows, example["row"], None))
    return turn_starts(columns, template_of(data), chat)
