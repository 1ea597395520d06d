"""Encoded examples, the report on their encoding, and seeded parts and samples of rows."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lora_ft.core.errors import DataError
from lora_ft.data.cache import column_batches

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
        "tokens": pa.int32(),
        "full_length": pa.int32(),
        "supervised": pa.int32(),
        "truncated": pa.bool_(),
        "merged": pa.bool_(),
    }
)


@dataclass(frozen=True)
class EncodingReport:
    """Counts of what became of the rows, and hashes of what was encoded.

    rows: rows read (of a held-out set: its rows). used: rows that became examples. examples: more than `used` if texts are
    split. held_out: rows kept for evaluation. not_sampled: rows outside the sample. skipped, skipped_count: the messages
    of the first bad rows, the number of all. dropped: rows that truncation left with nothing supervised. empty: rows
    whose completion is blank.
    truncated, merged: numbers of such examples, see `Examples`. tokens, supervised: sums over all examples. longest: tokens
    of the longest example.
    notes: what the chat template drops, what of the rows or the template has no effect.
    Of chats: turns: kind of turn -> [how many, how many of them supervised]. turn_ends: marker -> how many supervised
    turns it ends ("": none does).
    content: SHA-256 of the sources' content. sha256: of content, template, tokenizer and settings. Records contain both,
    and --resume compares them; what differs it finds by files (name -> SHA-256; {} if many) and texts (see `cached_table`).
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
    notes: list[str] = field(default_factory=list)
    turns: dict[str, list[int]] = field(default_factory=dict)
    turn_ends: dict[str, int] = field(default_factory=dict)
    content: str = ""
    sha256: str = ""
    files: dict[str, str] = field(default_factory=dict)
    texts: str = ""

    def summary(self) -> str:
        """One line for users with all counts that are not zero, and the first skipped rows below it."""
        counts = [
            (self.used, "rows used" if self.used == self.rows else f"of {self.rows:,} rows used"),
            (self.held_out, "held out for evaluation"),
            (self.not_sampled, "not in the sample"),
            (self.examples if self.examples != self.used else 0, "examples"),
            (self.tokens, "tokens"),
            (self.supervised, "of them supervised"),
            (self.truncated, "truncated"),
            (self.dropped, "dropped (nothing supervised left after truncation)"),
            (self.empty, "with an empty completion, so that only its end is supervised"),
            (self.merged, "with tokens that merge across the end of the prompt"),
            (self.skipped_count, "bad rows skipped"),
        ]
        line = ", ".join(f"{count:,} {label}" for count, label in counts if count)
        return line + "".join(f"\n  skipped {message}" for message in self.skipped[:3])


@dataclass(frozen=True)
class Examples:
    """Encoded examples.

    dataset: one example per row, with the columns
        input_ids, labels: int32 lists of equal length; labels[i] is input_ids[i] if supervised, else -100 (not shifted;
            labels[0] is always -100).
        row: the position of its row in the sources, from 0. where: its location, for messages.
        prompt_length: tokens before the completion (0 for texts and chats).
        choices: ids of each label word after the prompt, without end-of-sequence ([] if not a classification). label: the
            index of the right one, or -1.
        tokens, supervised: numbers of tokens. full_length: tokens before truncation. truncated: whether that was longer.
        merged: tokens merge across the end of the prompt, so the completion was tokenized alone.
    label_words: the words of `choices`.
    texts: the rendered rows (data/texts.py) of the whole set, of which the examples may be a sample, by `row` ascending.
    """

    dataset: datasets.Dataset
    report: EncodingReport
    label_words: list[str]
    texts: datasets.Dataset

    def with_prefix(self, ids: list[int]) -> "Examples":
        """The examples with `ids` (n virtual tokens, not supervised) in front of each.

        They are added as rows are read: neither the columns `tokens` and `full_length` nor the texts include them.
        """
        if not ids:
            return self
        prefix: dict[str, Any] = {"input_ids": ids, "labels": [-100] * len(ids), "prompt_length": len(ids)}

        def prefixed(batch: dict[str, list]) -> dict[str, list]:
            return {name: [prefix[name] + v for v in vs] if name in prefix else vs for name, vs in batch.items()}

        report = replace(self.report, longest=self.report.longest + len(ids))
        return replace(self, dataset=self.dataset.with_transform(prefixed), report=report)


def reports(sets: dict[str, Examples]) -> dict[str, Any] | None:
    """The report of a single unnamed set, reports by name for named sets, None without sets."""
    by_name = {name: asdict(examples.report) for name, examples in sets.items()}
    return by_name.get("", by_name or None)


def largest_id(examples: Examples) -> int:
    """The largest token id in the examples, label words included."""
    ids = column_batches(examples.dataset, "input_ids")
    choices = map(pc.list_flatten, column_batches(examples.dataset, "choices"))
    return max(pc.max(pc.list_flatten(lists)).as_py() or 0 for lists in itertools.chain(ids, choices))


def held_out_count(population: int, amount: int | float) -> int:
    """How many of `population` rows an amount (a count or, below 1, a fraction) holds out; DataError if all or none."""
    count = amount if isinstance(amount, int) else max(1, round(population * amount))
    if not 0 < count < population:
        raise DataError(f"data.eval: holding out {amount} of {population:,} usable rows leaves one side empty.")
    return count


def part_indices(population: int, held_out: Sequence[int | float], part: int | None, seed: int) -> np.ndarray:
    """The ascending indices of the rows in one part: the one that held_out[part] holds out, or the rest (part None).

    Each amount is taken from the rest that the amounts before it have left.
    """
    rest = np.arange(population)
    for i, amount in enumerate(held_out):
        indices = rest[sample_indices(len(rest), held_out_count(len(rest), amount), seed)]
        if i == part:
            return indices
        rest = np.setdiff1d(rest, indices)
    return rest


def sample_indices(population: int, count: int, seed: int) -> np.ndarray:
    """The ascending indices of a seeded sample: those with the `count` smallest random numbers.

    Python guarantees the numbers of `random()` across its versions, but not those of `sample`.
    """
    generator = random.Random(seed)
    draws = np.fromiter((generator.random() for _ in range(population)), float, population)
    return np.sort(np.argsort(draws, kind="stable")[:count])


def column_array(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers."""
    batches = [values.to_numpy(zero_copy_only=False) for values in column_batches(dataset, name)]
    return np.concatenate(batches) if batches else np.empty(0, int)


def totals(dataset: datasets.Dataset) -> dict[str, int]:
    """The report's counts over all examples."""
    sums = {name: int(column_array(dataset, name).sum()) for name in ("tokens", "supervised", "truncated", "merged")}
    return sums | {"longest": int(column_array(dataset, "tokens").max(initial=0))}
