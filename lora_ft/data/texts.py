"""The first stage: rows of the sources as texts, in a table made once."""

import itertools
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lora_ft.core.errors import DataError
from lora_ft.core.messages import printable
from lora_ft.data.cache import Write, cached, key_of
from lora_ft.data.chat import chat_format, read_turns, render_chat
from lora_ft.data.sources import iter_rows
from lora_ft.data.template import BadRow, Columns, Template, pair_renderer, renderer, value_of

CODE = 3  # raise it when this package comes to encode the same rows otherwise: older cache entries are then left alone
BATCH = 1000
LISTED = 20  # bad rows named in a report
SKIP_HINT = "Mend it, or leave such rows out with data.bad_rows: skip."

TEXTS = pa.schema(
    {
        "row": pa.int64(),
        "where": pa.string(),
        "prompt": pa.large_string(),
        "completion": pa.large_string(),  # or the text, or the chat
        "choices": pa.list_(pa.large_string()),
        "label": pa.int32(),
        "spans": pa.list_(pa.int32()),  # of a chat: start, end, ... of what the assistant says, in characters
    }
)


class BadRows:
    """Raises at the first bad row, or with `skip` counts them and keeps the first messages."""

    def __init__(self, bad_rows: str):
        self.skip = bad_rows == "skip"
        self.messages: list[str] = []
        self.count = 0

    def add(self, where: str, problem: object) -> None:
        message = f"{where}: {problem}"
        message += "" if message[-1] in ".!?" else "."
        if not self.skip:
            raise DataError(f"{message} {SKIP_HINT}")
        self.count += 1
        if len(self.messages) < LISTED:
            self.messages.append(message)

    def facts(self) -> dict[str, Any]:
        return {"skipped": self.messages, "skipped_count": self.count}


def load_texts(
    sources: list[str],
    content: str,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: str,
) -> tuple[datasets.Dataset, dict]:
    """The rows' texts (TEXTS), and how many rows were read and skipped."""
    render, identity = _text_renderer(template, tokenizer)

    def make(write: Write) -> dict:
        bad, count = BadRows(bad_rows), 0
        rows = itertools.chain.from_iterable(map(iter_rows, sources))
        for chunk in _chunks(rows, BATCH):
            batch: dict[str, list] = {name: [] for name in TEXTS.names}
            for where, columns, problem in chunk:
                try:
                    if problem:
                        raise BadRow(problem)
                    values = (count, where, *render(columns))
                except BadRow as e:
                    bad.add(where, e)
                else:
                    for column, value in zip(batch.values(), values, strict=True):
                        column.append(value)
                count += 1
            write(batch)
        return {"rows": count} | bad.facts()

    key = key_of("texts", content, sources, identity, bad_rows, CODE, version("transformers"))
    texts, facts = cached(key, TEXTS, make, "reading")
    if not facts["rows"]:
        raise DataError(f"{names_of(sources)}: no rows: empty, only blank lines, or only a header.")
    if not len(texts):
        first = "".join(f"\n  {message}" for message in facts["skipped"][:3])
        raise DataError(f"{names_of(sources)}: all {facts['rows']:,} rows are bad; the first:{first}")
    return texts, facts


def _text_renderer(
    template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[Callable[[Columns], tuple[str, str, list[str], int, list[int]]], list]:
    """A function from a row to (prompt, completion or text, choices, label, spans), and what its results depend on."""
    if template.messages:
        column = template.messages
        chat = chat_format(tokenizer, template.chat_template)

        def render_turns(columns: Columns):
            text, spans = render_chat(read_turns(value_of(columns, column)), chat)
            return "", text, [], -1, [position for span in spans for position in span]

        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return render_turns, [template.as_dict(), chat.template, sorted(chat.end_tokens), special]
    if template.text is not None:
        fill = renderer("text", template.text, template.label_names or {})

        def render_text(columns: Columns):
            text = fill(columns)
            if not text:
                raise BadRow("its text is empty, so nothing is supervised")
            return "", text, [], -1, []

        return render_text, [template.as_dict()]
    pair = pair_renderer(template)

    def render_pair(columns: Columns):
        return *pair(columns), []

    return render_pair, [template.as_dict()]


def _chunks(rows: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def names_of(sources: list[str]) -> str:
    return printable(", ".join(sources))
