"""From sources to encoded examples in two cached stages: rows to texts, then texts to ids and labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lora_ft.config.schema import CHAT_SETTINGS
from lora_ft.core.errors import DataError
from lora_ft.data.cache import BATCH, RELEASED, Write, cached, key_of, release
from lora_ft.data.chats.encode import encode_chats
from lora_ft.data.examples import (
    EXAMPLES,
    EncodingReport,
    Examples,
    column_array,
    part_indices,
    sample_indices,
    totals,
)
from lora_ft.data.files import DEFAULT, FileFormat
from lora_ft.data.pieces import Ids
from lora_ft.data.sources import content_hash
from lora_ft.data.template import Template
from lora_ft.data.texts import (
    ENCODING_VERSION,
    MAX_BATCH_CHARS,
    MAX_REPORTED_ROWS,
    BadRows,
    chat_format_of,
    join_names,
    load_texts,
)
from lora_ft.data.tokens import Encoded, encode_pairs, encode_texts, text_encoder
from lora_ft.model.load import tokenizer_hash

MAX_FILES = 1_000  # whose hashes a record keeps


def load_examples(
    sources: Sequence[str],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncate: Literal["column", "start", "end"] = "column",
    long_text: Literal["truncate", "split"] = "truncate",
    bad_rows: Literal["error", "skip"] = "error",
    format: FileFormat = DEFAULT,
    held_out: Sequence[int | float] = (),
    part: int | None = None,
    max_examples: int | None = None,
    seed: int = 0,
) -> Examples:
    """The rows of the sources, in order, as examples. Only rows that are used are encoded.

    max_length: in tokens; truncate: what a longer prompt loses. format: how text files are written. held_out, part: use only
    the rows of one part, as `part_indices` defines it. max_examples: use only a seeded sample of this many rows, in order.

    Raises:
        DataError: a source or row cannot be read or encoded, label words have equal ids, or nothing is left to train on.
        ModelError: chats without a chat template.
    """
    hashes = [content_hash(source, format) for source in sources]
    content = key_of([hashed for hashed, _ in hashes])
    files = {name: hashed for _, by_name in hashes for name, hashed in by_name.items()}
    settings = [_identity(template), tokenizer_hash(tokenizer), max_length, long_text, bad_rows]
    which = [max_examples, seed, list(held_out), part]
    texts, read = load_texts(sources, content, template, tokenizer, bad_rows, format)
    is_rest, rows = part is None, part_indices(len(texts), held_out, part, seed)
    count = len(rows) if max_examples is None else min(max_examples, len(rows))
    sample = rows[sample_indices(len(rows), count, seed)] if count < len(rows) else rows
    chat = chat_format_of(template, tokenizer).template if template.messages else None
    # of records: without versions, as --resume compares it with that of an earlier run
    sha256 = key_of(content, settings + which, chat)
    rows_key = sha256 if len(sample) < len(texts) else key_of(content, settings, chat)  # all rows: whatever the seed is
    dataset, made = cached(
        key_of(rows_key, truncate, sources, ENCODING_VERSION, version("tokenizers"), version("transformers")),
        EXAMPLES,
        lambda write: _encode(
            texts, sample, template, max_length, truncate, long_text == "split", bad_rows, tokenizer, write
        ),
        "encoding",
        len(sample),
    )
    if not len(dataset):
        raise DataError(
            f"{join_names(sources)}: nothing supervised is left in any of the {len(sample):,} rows after truncation to "
            f"{max_length} tokens. Raise data.max_length."
        )
    counts: dict = {"rows": len(rows), "examples": len(dataset), "not_sampled": len(rows) - len(sample)}
    counts |= made | totals(dataset)
    if is_rest:  # rows skipped while reading are reported once, with the training rows
        counts |= {"rows": read["rows"], "held_out": len(texts) - len(rows)}
        counts["skipped"] = (read["skipped"] + made["skipped"])[:MAX_REPORTED_ROWS]
        counts["skipped_count"] += read["skipped_count"]
        counts |= {name: read[name] for name in ("notes", "turns", "turn_ends") if name in read}
    if template.text is None and counts["truncated"] and truncate != ("end" if template.messages else "start"):
        sha256 = key_of(sha256, truncate)  # earlier versions cut prompts at the start, chats at the end
    counts |= {"texts": read["key"], "files": files if len(files) <= MAX_FILES else {}}
    report = EncodingReport(**counts, content=content, sha256=sha256)
    words = template.label_names[template.label_column] if template.label_names and template.label_column else []
    return Examples(dataset, report, list(words), texts.select(rows) if held_out else texts)


def _identity(template: Template) -> dict:
    """The template for a hash that records contain: settings of chats only where they are set, as earlier versions had none."""
    kept = {name: value for name, value in asdict(template).items() if name not in CHAT_SETTINGS}
    set_here = (name for name in CHAT_SETTINGS if getattr(template, name) != getattr(Template, name))
    chats = {name: getattr(template, name) for name in set_here}
    return kept | chats | ({"spans": 2} if template.messages else {})  # 2: a turn ends with its first end marker


def _encode(
    texts: datasets.Dataset,
    rows: np.ndarray,
    template: Template,
    max_length: int,
    truncate: str,
    split: bool,
    bad_rows: str,
    tokenizer: PreTrainedTokenizerBase,
    write: Write,
) -> dict:
    """Write the examples (EXAMPLES) of some rows of the texts. Returns how many rows were used, dropped, empty and skipped."""
    encoder = text_encoder(tokenizer)  # here, as it takes some time, and data in the cache needs none
    bad, used, dropped, empty = BadRows(bad_rows), 0, 0, 0
    checked: Sequence[Ids] = ()  # the choices that were compared last: most rows have the same
    for n, (start, end) in enumerate(_batches(column_array(texts, "chars")[rows])):
        batch = _read(texts, rows[start:end])
        if n % RELEASED == 0:
            release(texts)
        encoded: Iterator[Iterable[Encoded]]  # the pieces of each row
        if template.messages:
            chats = (batch["completion"], batch["spans"], batch["turns"])
            encoded = ([e] for e in encode_chats(*chats, max_length, truncate, encoder))
        elif template.text is not None:
            encoded = encode_texts(batch["completion"], max_length, split, encoder)
        else:
            texts_of_rows = (batch["prompt"], batch["completion"], batch["choices"], batch["spans"])
            pairs = encode_pairs(*texts_of_rows, max_length, truncate, encoder)
            encoded = ([e] for e in pairs)
            empty += sum(not completion.strip() for completion in batch["completion"])
        examples: list[tuple] = []
        tokens = 0  # in `examples`
        for row, where, label, pieces in zip(batch["row"], batch["where"], batch["label"], encoded, strict=True):
            kept = 0
            for e in pieces:
                if problem := _problem(e):
                    bad.add(where, problem)
                    break
                if e.choices is not checked:
                    _refuse_equal(e.choices, where)
                    checked = e.choices
                supervised = e.supervised
                if supervised:
                    source = (row, where, e.prompt_length, e.choices, label)
                    counts = (len(e.input_ids), e.full_length, supervised, e.truncated, e.merged)
                    examples.append((e.input_ids, e.labels, *source, *counts))
                    kept, tokens = kept + 1, tokens + len(e.input_ids)
                if tokens > MAX_BATCH_CHARS:
                    write(examples)
                    examples, tokens = [], 0
            else:
                used, dropped = used + bool(kept), dropped + (not kept)
        write(examples)
    return {"used": used, "dropped": dropped, "empty": empty} | bad.facts()


def _batches(chars: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of rows of BATCH rows and MAX_BATCH_CHARS characters at most, or of one row."""
    ends, start = np.cumsum(chars), 0
    while start < len(chars):
        limit = (ends[start - 1] if start else 0) + MAX_BATCH_CHARS
        end = min(start + BATCH, max(start + 1, int(np.searchsorted(ends, limit, "right"))))
        yield start, end
        start = end


def _read(texts: datasets.Dataset, rows: np.ndarray) -> dict[str, list]:
    """The columns of some rows, ascending, read by runs of neighbours: a selection of `datasets` is read row by row."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    runs = zip(rows[starts].tolist(), np.diff(starts, append=len(rows)).tolist(), strict=True)
    return pa.concat_tables(texts.data.fast_slice(first, count) for first, count in runs).to_pydict()


def _problem(example: Encoded) -> str:
    """What is wrong with a row by its first example; "" if nothing is."""
    if example.blank:
        return "nothing in it is supervised"
    if example.choices and not example.prompt_length:
        return "its prompt is empty or does not fit, so its label words cannot be compared"
    return ""


def _refuse_equal(choices: Sequence[Ids], where: str) -> None:
    if len(set(map(bytes, choices))) < len(choices):
        raise DataError(
            f"{where}: two label words have equal tokens after the prompt, so they cannot be told apart. "
            "Choose other words in data.label_names."
        )
