"""The turns of a chat that `lora-ft check` shows."""

import itertools
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from lora_ft.config.schema import DataConfig
from lora_ft.data.chats.encode import lost_of_chat
from lora_ft.data.chats.render import render_chat, turn_starts
from lora_ft.data.cuts import CUT_MARK
from lora_ft.data.files import file_format
from lora_ft.data.prepare import find_chat, template_of
from lora_ft.data.sources import iter_rows
from lora_ft.data.tokens import text_encoder

Starts = list[tuple[str, int]]  # kind of turn, and where it starts in the chat's text


def chat_turns(example: Mapping, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Starts:
    """The turns of an example of the training data, read from its row again; of one that was cut those that are left."""
    chat, template = find_chat(data, tokenizer), template_of(data)
    assert chat is not None
    rows = itertools.chain.from_iterable(iter_rows(source, file_format(data.format)) for source in data.train)
    _, columns, _ = next(itertools.islice(rows, example["row"], None))
    starts = turn_starts(columns, template, chat)
    if not example["truncated"]:
        return starts
    done = render_chat(columns, template, chat)
    spans, others = (list(itertools.chain.from_iterable(parts)) for parts in (done.spans, done.others))
    lost = lost_of_chat(done.text, spans, others, data.max_length, data.truncate, text_encoder(tokenizer))
    return left_turns(starts, len(done.text), lost, len(CUT_MARK) if data.truncate == "column" else 0)


def left_turns(starts: Starts, length: int, lost: Sequence[tuple[int, int]], mark: int) -> Starts:
    """The turns that are left of a chat of `length` characters, and where they start in what is left of it.

    mark: the characters that stand for each part of `lost`. Where of a turn only the header is left, the next one has it.
    """
    left: Starts = []
    header = None
    for i, (kind, start) in enumerate(starts):
        end = starts[i + 1][1] if i + 1 < len(starts) else length
        if any(a <= start and end <= b for a, b in lost):
            continue
        if mark and i + 1 < len(starts) and any(start < a < end <= b for a, b in lost):
            header = start if header is None else header
            continue
        start = start if header is None else header
        start = next((b for a, b in lost if a <= start < b), start)  # its beginning is lost
        left.append((kind, start - sum(b - a - mark for a, b in lost if b <= start)))
        header = None
    return left
