"""The first cached stage: the rows of the sources, rendered as texts."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lora_ft.core.errors import DataError
from lora_ft.core.messages import printable
from lora_ft.core.names import nearest
from lora_ft.data.cache import BATCH, Write, cached, key_of
from lora_ft.data.chats.format import ChatFormat, chat_format
from lora_ft.data.chats.render import ChatSummary, render_chat
from lora_ft.data.files import DEFAULT, FileFormat
from lora_ft.data.sources import iter_rows
from lora_ft.data.template import BadRow, Columns, Template, optional_columns, pair_renderer, renderer

ENCODING_VERSION = 9  # raise it when rows are encoded differently, or a schema changes: old cache entries expire
MAX_BATCH_CHARS = 2**22  # that are in memory at once, unless it is one row
MAX_REPORTED_ROWS = 20

TEXTS = pa.schema(
    {
        "row": pa.int64(),
        "where": pa.string(),
        "prompt": pa.large_string(),
        "completion": pa.large_string(),  # or the text, or the chat, whose prompt is its last generation prompt
        "choices": pa.list_(pa.large_string()),
        "label": pa.int32(),
        "spans": pa.list_(
            pa.int32()
        ),  # start, end, ... in characters: a chat's assistant turns, the columns in a prompt
        "turns": pa.list_(pa.int32()),  # start, end, role, ... (data/cuts.py): a chat's other turns
        "chars": pa.int64(),  # of all its texts
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
    sources: Sequence[str],
    content: str,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: str,
    format: FileFormat = DEFAULT,
) -> tuple[datasets.Dataset, dict]:
    """The rows of the sources as texts (a TEXTS table, cached), with its key and the numbers of rows read and skipped.

    content: a hash of the sources' content. format: how their text files are written.

    Raises:
        DataError: a source cannot be read, has a bad row that is not skipped, or no rows.
    """
    chat = chat_format_of(template, tokenizer) if template.messages else None
    render, optional = _text_renderer(template), optional_columns(template)

    def make(write: Write) -> dict:
        bad, count, summary, chars = BadRows(bad_rows), 0, ChatSummary(), 0
        seen: dict[str, None] = {}
        rendered: list[tuple] = []
        rows = itertools.chain.from_iterable(iter_rows(source, format) for source in sources)
        for row, (where, columns, problem) in enumerate(rows):
            count = row + 1
            try:
                if problem:
                    raise BadRow(problem)
                if optional:
                    seen |= dict.fromkeys(columns)
                if chat:
                    done = render_chat(columns, template, chat)
                    summary.add(where, done)
                    spans = [position for span in done.spans for position in span]
                    turns = list(itertools.chain.from_iterable(done.others))
                    values: tuple = (done.prompt, done.text, [], -1, spans, turns)
                else:
                    values = (*render(columns), [])
            except BadRow as e:
                bad.add(where, e)
                continue
            size = len(values[0]) + len(values[1]) + sum(map(len, values[2]))
            rendered.append((row, where, *values, size))
            chars += size
            if len(rendered) == BATCH or chars > MAX_BATCH_CHARS:
                write(rendered)
                rendered, chars = [], 0
        write(rendered)
        never = [_never_filled(column, seen) for column in sorted(optional - seen.keys())]
        return {"rows": count} | bad.facts() | (summary.facts() if chat else {"notes": never} if never else {})

    identity: list[Any] = [asdict(template)]
    if chat:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        identity += [chat.template, sorted(chat.ends), chat.markers.pattern, special]
    key = key_of("texts", content, sources, identity, bad_rows, ENCODING_VERSION, version("transformers"))
    texts, facts = cached(key, TEXTS, make, "reading")
    if not facts["rows"]:
        raise DataError(f"{join_names(sources)}: no rows: the file is empty, or has only blank lines or a header.")
    if not len(texts):
        first = "".join(f"\n  {message}" for message in facts["skipped"][:3])
        raise DataError(f"{join_names(sources)}: all {facts['rows']:,} rows are bad; the first:{first}")
    return texts, facts | {"key": key}


def chat_format_of(template: Template, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The chat format of a template of messages. Raises ModelError if there is no chat template."""
    return chat_format(tokenizer, template.chat_template, template.chat_template_kwargs)


def _never_filled(column: str, columns: Iterable[str]) -> str:
    """A note on an optional column that no row has."""
    near = nearest(column, columns)
    hint = f'. Did you mean "{printable(near)}"?' if near else ""
    return (
        f'no row has the column "{printable(column)}", so the part of the template in [[ ]] is never filled by it{hint}'
    )


def _text_renderer(template: Template) -> Callable[[Columns], tuple[str, str, list[str], int, list[int]]]:
    """A function from a row to the columns prompt, completion, choices, label, spans; not for chats."""
    if template.text is None:
        return pair_renderer(template)
    fill = renderer("text", template.text, template.label_names or {})

    def render_text(columns: Columns) -> tuple[str, str, list[str], int, list[int]]:
        text = fill(columns)
        if not text:
            raise BadRow("its text is empty, so nothing is supervised")
        return "", text, [], -1, []

    return render_text


def join_names(sources: Sequence[str]) -> str:
    """The names of the sources, for a message."""
    return printable(", ".join(sources))
