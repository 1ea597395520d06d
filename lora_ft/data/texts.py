"""The first cached stage: the rows of the sources, rendered as texts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from lora_ft.data.template import BadRow, Columns, Template, column_value, pair_renderer, renderer

ENCODING_VERSION = 4  # raise it when rows are encoded differently, or a schema changes: old cache entries expire
BATCH = 1000  # rows
MAX_REPORTED_ROWS = 20

TEXTS = pa.schema(
    {
        "row": pa.int64(),
        "where": pa.string(),
        "prompt": pa.large_string(),
        "completion": pa.large_string(),  # or the text, or the chat
        "choices": pa.list_(pa.large_string()),
        "label": pa.int32(),
        "spans": pa.list_(pa.int32()),  # start, end, ... of a chat's assistant turns, in characters
    }
)


class BadRows:
    """Raises at the first bad row, or with `skip` counts bad rows and keeps the first MAX_REPORTED_ROWS messages."""

    def __init__(self, bad_rows: str):
        self.skip = bad_rows == "skip"
        self.messages: list[str] = []
        self.count = 0

    def add(self, where: str, problem: object) -> None:
        """Register the row at `where`; raises DataError if bad rows are not skipped."""
        message = f"{where}: {problem}"
        message += "" if message[-1] in ".!?" else "."
        if not self.skip:
            raise DataError(f"{message} Fix the row, or skip such rows with data.bad_rows: skip.")
        self.count += 1
        if len(self.messages) < MAX_REPORTED_ROWS:
            self.messages.append(message)

    def facts(self) -> dict[str, Any]:
        """The skipped rows, for a report."""
        return {"skipped": self.messages, "skipped_count": self.count}


def load_texts(
    sources: Sequence[str], content: str, template: Template, tokenizer: PreTrainedTokenizerBase, bad_rows: str
) -> tuple[datasets.Dataset, dict]:
    """The rows of the sources as texts (a TEXTS table, cached), with the numbers of rows read and skipped.

    content: a hash of the sources' content.

    Raises:
        DataError: a source cannot be read, has a bad row that is not skipped, or no rows.
    """
    render, identity = _text_renderer(template, tokenizer)

    def make(write: Write) -> dict:
        bad, count = BadRows(bad_rows), 0
        rows = enumerate(itertools.chain.from_iterable(map(iter_rows, sources)))
        while chunk := list(itertools.islice(rows, BATCH)):
            rendered = []
            for row, (where, columns, problem) in chunk:
                try:
                    if problem:
                        raise BadRow(problem)
                    rendered.append((row, where, *render(columns)))
                except BadRow as e:
                    bad.add(where, e)
            count += len(chunk)
            write(rendered)
        return {"rows": count} | bad.facts()

    key = key_of("texts", content, sources, identity, bad_rows, ENCODING_VERSION, version("transformers"))
    texts, facts = cached(key, TEXTS, make, "reading")
    if not facts["rows"]:
        raise DataError(f"{join_names(sources)}: no rows: the file is empty, or has only blank lines or a header.")
    if not len(texts):
        first = "".join(f"\n  {message}" for message in facts["skipped"][:3])
        raise DataError(f"{join_names(sources)}: all {facts['rows']:,} rows are bad; the first:{first}")
    return texts, facts


def _text_renderer(
    template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[Callable[[Columns], tuple[str, str, list[str], int, list[int]]], list]:
    """A function from a row to the columns prompt, completion, choices, label, spans, and all that its results depend on."""
    if template.messages:
        column = template.messages
        chat = chat_format(tokenizer, template.chat_template)

        def render_turns(columns: Columns):
            text, spans = render_chat(read_turns(column_value(columns, column)), chat)
            return "", text, [], -1, [position for span in spans for position in span]

        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return render_turns, [asdict(template), chat.template, sorted(chat.end_tokens), special]
    if template.text is not None:
        fill = renderer("text", template.text, template.label_names or {})

        def render_text(columns: Columns):
            text = fill(columns)
            if not text:
                raise BadRow("its text is empty, so nothing is supervised")
            return "", text, [], -1, []

        return render_text, [asdict(template)]
    render_pair = pair_renderer(template)
    return lambda columns: (*render_pair(columns), []), [asdict(template)]


def join_names(sources: Sequence[str]) -> str:
    """The names of the sources, for a message."""
    return printable(", ".join(sources))
