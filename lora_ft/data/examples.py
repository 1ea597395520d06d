"""Encoded examples, what is known of them, and their parts by seed."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lora_ft.core.errors import DataError

IDS = pa.list_(pa.int32())
EXAMPLES = pa.schema(
    {
        "input_ids": IDS,
        "labels": IDS,
        "row": pa.int64(),
        "where": pa.string(),
        "prompt_length": pa.int32(),
        "choices": pa.list_(IDS),
        "label": pa.int32(),
        "tokens": pa.int32(),  # len(input_ids)
        "whole": pa.int32(),  # tokens before truncation
        "supervised": pa.int32(),
        "truncated": pa.bool_(),
        "merged": pa.bool_(),
    }
)


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows.

    rows: read. used: of them in `examples` examples (a split text is several). held_out: kept for evaluation (of
    these a report of their own says `rows`). not_sampled: left out by a sample. skipped: the first bad rows,
    skipped_count all of them. dropped: rows that truncation left with nothing supervised. empty: rows used whose
    completion is blank. truncated, merged: examples. tokens, supervised: of all examples; longest: tokens of the
    longest. content: SHA-256 of the sources' content. sha256: of content, template, tokenizer and settings, so of what
    was encoded.
    """

    rows: int
    used: int
    examples: int
    held_out: int = 0
    not_sampled: int = 0
    skipped: list[str] = field(default_factory=list)
    skipped_count: int = 0
    dropped: int = 0
    empty: int = 0
    truncated: int = 0
    merged: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    content: str = ""
    sha256: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line for people; only what happened is named."""
        told = [
            (self.used, "rows used" if self.used == self.rows else f"of {self.rows:,} rows used"),
            (self.held_out, "held out for evaluation"),
            (self.not_sampled, "not in the sample"),
            (self.examples if self.examples != self.used else 0, "examples"),
            (self.tokens, "tokens"),
            (self.supervised, "of them supervised"),
            (self.truncated, "truncated"),
            (self.dropped, "dropped (truncation left nothing supervised)"),
            (self.empty, "with an empty completion, so that only its end is supervised"),
            (self.merged, "with tokens that merge across the prompt's end"),
            (self.skipped_count, "bad rows skipped"),
        ]
        line = ", ".join(f"{number:,} {what}" for number, what in told if number)
        return line + "".join(f"\n  skipped {message}" for message in self.skipped[:3])


@dataclass(frozen=True)
class Examples:
    """Encoded examples.

    dataset: one row an example. input_ids, labels: int32 lists of one length; labels[i] is input_ids[i] where
    supervised, else -100 (not shifted; never at i = 0). tokens, supervised: their numbers; whole: tokens before
    truncation. row: position in the sources, from 0; where: for messages. prompt_length: tokens before the completion
    (0 for text and chat). choices: ids of each label word after the prompt, no end-of-sequence ([] if not a
    classification); label: the right one, or -1. label_words: the words, in that order. texts: those of the whole set
    (data/texts.py), of which the examples may be a sample, by `row` ascending.
    """

    dataset: datasets.Dataset
    report: EncodingReport
    label_words: list[str]
    texts: datasets.Dataset

    def with_prefix(self, ids: list[int]) -> "Examples":
        """The same examples with `ids` (n virtual tokens, unsupervised) before each one's own; n = 0 changes nothing.

        The rows are changed as they are read: the columns `tokens` and `whole` and the texts stay without the prefix.
        """
        if not ids:
            return self

        def prefixed(batch: dict[str, list]) -> dict[str, list]:
            longer = {
                "input_ids": lambda row: ids + row,
                "labels": lambda row: [-100] * len(ids) + row,
                "prompt_length": lambda length: len(ids) + length,
            }
            return {name: [longer.get(name, lambda value: value)(v) for v in values] for name, values in batch.items()}

        report = replace(self.report, longest=self.report.longest + len(ids))
        return replace(self, dataset=self.dataset.with_transform(prefixed), report=report)


def reports(sets: dict[str, Examples]) -> dict[str, Any] | None:
    """Of a single set without a name its report; of named ones theirs by name; of none None."""
    found = {name: examples.report.as_dict() for name, examples in sets.items()}
    return found.get("", found or None)


def largest_id(examples: Examples) -> int:
    """The largest token id in any row that was encoded, label words included."""
    columns = [examples.dataset.data.column("input_ids"), pc.list_flatten(examples.dataset.data.column("choices"))]
    return max(pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns)


def held_count(population: int, held_out: int | float) -> int:
    """How many of `population` rows are held out: a count or, below 1, a fraction.

    Raises:
        DataError: nothing would be left on one side.
    """
    count = held_out if isinstance(held_out, int) else max(1, round(population * held_out))
    if not 0 < count < population:
        raise DataError(
            f"data.eval: {held_out} of {population:,} usable rows can't be held out and leave rows to train on."
        )
    return count


def part_of(population: int, held_out: Sequence[int | float], part: int | None, seed: int) -> np.ndarray:
    """Which of `population` rows are a part, ascending: that of the amount held_out[part] (as in `held_count`), or the rest.

    Each amount is taken from what the one before has left.
    """
    rest = np.arange(population)
    for i, amount in enumerate(held_out):
        held = rest[sample_indices(len(rest), held_count(len(rest), amount), seed)]
        if i == part:
            return held
        rest = np.setdiff1d(rest, held)
    return rest


def sample_indices(population: int, count: int, seed: int) -> np.ndarray:
    """Indices of `count` of `population` things, ascending: those with the smallest of a seeded generator's numbers.

    Python promises that `random()` gives the same numbers in all its versions; it promises no such thing of `sample`.
    """
    generator = random.Random(seed)
    draws = np.fromiter((generator.random() for _ in range(population)), float, population)
    return np.sort(np.argsort(draws, kind="stable")[:count])


def row_numbers(dataset: datasets.Dataset) -> np.ndarray:
    """Of each example (or text) the position of its row in the sources."""
    return _column(dataset, "row")


def _column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    return np.asarray(dataset.select_columns(name).with_format("numpy")[:][name])


def counts(dataset: datasets.Dataset) -> dict[str, int]:
    """The report's totals over all examples."""
    columns = {name: _column(dataset, name) for name in ("tokens", "supervised", "truncated", "merged")}
    totals = {name: int(column.sum()) for name, column in columns.items()}
    return totals | {"longest": int(columns["tokens"].max(initial=0))}
