"""From sources to encoded examples, in two cached stages: rows to texts, then texts to ids and labels."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Literal

import datasets
from transformers import PreTrainedTokenizerBase

from lora_ft.core.errors import DataError
from lora_ft.data.cache import Write, cached, key_of
from lora_ft.data.chat import chat_format
from lora_ft.data.examples import EXAMPLES, EncodingReport, Examples, counts, part_of, sample_indices
from lora_ft.data.sources import content_hash
from lora_ft.data.template import Template
from lora_ft.data.texts import BATCH, CODE, LISTED, BadRows, load_texts, names_of
from lora_ft.data.tokens import Coder, Encoded, coder, encode_chats, encode_pairs, encode_texts
from lora_ft.model.load import tokenizer_hash

__all__ = ["EncodingReport", "Examples", "Template", "load_examples"]


def load_examples(
    sources: list[str],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    long_text: Literal["truncate", "split"] = "truncate",
    bad_rows: Literal["error", "skip"] = "error",
    held_out: Sequence[int | float] = (),
    part: int | None = None,
    max_examples: int | None = None,
    seed: int = 0,
) -> Examples:
    """Rows of the sources, one after the other, as examples; a seeded sample of `max_examples` of them, in their order.

    With `held_out` only the rows of one `part` (see `part_of`). What isn't chosen isn't encoded.

    Raises:
        DataError: a source or row that can't be read or encoded, label words with equal ids, or nothing left to train
        on. ModelError: chats without a chat template.
    """
    content = key_of([content_hash(source) for source in sources])
    settings = [template.as_dict(), tokenizer_hash(tokenizer), max_length, long_text, bad_rows, max_examples, seed]
    settings += [list(held_out), part]
    whole, read = load_texts(sources, content, template, tokenizer, bad_rows)
    usable, rest = len(whole), part is None
    if held_out:
        whole = whole.select(part_of(usable, held_out, part, seed))
    texts = whole
    if max_examples is not None and max_examples < len(whole):
        texts = whole.select(sample_indices(len(whole), max_examples, seed))
    chat = chat_format(tokenizer, template.chat_template).template if template.messages else None
    sha256 = key_of(content, settings, chat)
    coding = coder(tokenizer)
    dataset, made = cached(
        key_of(sha256, sources, CODE, version("tokenizers"), version("transformers")),
        EXAMPLES,
        lambda write: _encode(texts, template, max_length, long_text == "split", bad_rows, coding, write),
        "encoding",
        len(texts),
    )
    if not len(dataset):
        raise DataError(
            f"{names_of(sources)}: nothing supervised is left in any of the {len(texts):,} rows after truncation to "
            f"{max_length} tokens. Raise data.max_length."
        )
    report = EncodingReport(
        rows=read["rows"] if rest else len(whole),  # what was skipped is told once, with the training rows
        used=made["used"],
        examples=len(dataset),
        held_out=usable - len(whole) if rest else 0,
        not_sampled=len(whole) - len(texts),
        skipped=((read["skipped"] if rest else []) + made["skipped"])[:LISTED],
        skipped_count=(read["skipped_count"] if rest else 0) + made["skipped_count"],
        dropped=made["dropped"],
        empty=made["empty"],
        content=content,
        sha256=sha256,
        **counts(dataset),
    )
    words = template.label_names[template.label_column] if template.label_names and template.label_column else []
    return Examples(dataset, report, list(words), whole)


def _encode(
    texts: datasets.Dataset,
    template: Template,
    max_length: int,
    split: bool,
    bad_rows: str,
    coding: Coder,
    write: Write,
) -> dict:
    """Write the texts' examples (EXAMPLES); how many rows were used, dropped, skipped, and have a blank completion."""
    bad, used, dropped, empty = BadRows(bad_rows), 0, 0, 0
    for batch in texts.iter(batch_size=BATCH):
        encoded: Iterator[list[Encoded]]
        if template.messages:
            encoded = ([e] for e in encode_chats(batch["completion"], batch["spans"], max_length, coding))
        elif template.text is not None:
            encoded = encode_texts(batch["completion"], max_length, split, coding)
        else:
            pairs = encode_pairs(batch["prompt"], batch["completion"], batch["choices"], max_length, coding)
            encoded = ([e] for e in pairs)
            empty += sum(not completion.strip() for completion in batch["completion"])
        out: dict[str, list] = {name: [] for name in EXAMPLES.names}
        for row, where, label, pieces in zip(batch["row"], batch["where"], batch["label"], encoded, strict=True):
            if pieces[0].blank:
                bad.add(where, "nothing in it is supervised")
                continue
            if pieces[0].choices and not pieces[0].prompt_length:
                bad.add(where, "nothing of its prompt is there or fits, so its label words can't be compared")
                continue
            _check_choices(pieces[0].choices, where)
            kept = [piece for piece in pieces if piece.supervised]
            used, dropped = used + bool(kept), dropped + (not kept)
            for e in kept:
                values = (
                    *(e.input_ids, e.labels, row, where, e.prompt_length, e.choices, label),
                    *(len(e.input_ids), e.whole, e.supervised, e.truncated, e.merged),
                )
                for column, value in zip(out.values(), values, strict=True):
                    column.append(value)
        write(out)
    return {"used": used, "dropped": dropped, "empty": empty} | bad.facts()


def _check_choices(choices: list[list[int]], where: str) -> None:
    if len({tuple(choice) for choice in choices}) < len(choices):
        raise DataError(
            f"{where}: two label words have equal tokens after the prompt, so they can't be told apart. "
            "Choose other words in data.label_names."
        )
