"""What is suspicious about a run before it begins: sentences for people, and the counts behind them.

Nothing here refuses: what training refuses is an error and raised where training raises it.
"""

from collections.abc import Iterable, Mapping

import datasets
import numpy as np
import pyarrow as pa

from lora_ft.config.load import DataConfig
from lora_ft.core.messages import printable
from lora_ft.data.examples import Examples

FEW_LABELS = 20  # distinct completions at most that are taken for the labels of a classification


def lists(dataset: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as (all values, where each list begins; one more at the end)."""
    values = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    return values.flatten().to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(lengths)])


def ends_learned(examples: Examples, ends: Iterable[int]) -> int:
    """Examples whose last supervised token is one of `ends`: after them generation learns to stop."""
    labels, starts = lists(examples.dataset, "labels")
    last = np.maximum.reduceat(np.where(labels >= 0, np.arange(len(labels)), -1), starts[:-1])
    return int(np.isin(labels[last], list(ends)).sum())


def in_common(train: Examples, evaluation: Examples) -> int:
    """Eval examples whose tokens are also a training example's, one for one."""
    seen = set(_rows(train.dataset))
    return sum(row in seen for row in _rows(evaluation.dataset))


def _rows(dataset: datasets.Dataset) -> Iterable[bytes]:
    ids, starts = lists(dataset, "input_ids")
    return (ids[a:b].tobytes() for a, b in zip(starts[:-1], starts[1:], strict=True))


def alike_labels(examples: Examples, tokenizer) -> list[tuple[str, str]]:
    """Pairs of labels that begin with the same token: label words, or completions of which there are only a few."""
    if examples.label_words:
        answers = {tuple(choice) for choice in examples.dataset[0]["choices"]}
    else:
        labels, starts = lists(examples.dataset, "labels")
        answers = set()
        for a, b in zip(starts[:-1], starts[1:], strict=True):
            row = labels[a:b]
            answers.add(tuple(row[row >= 0].tolist()))
            if len(answers) > FEW_LABELS:
                return []
        if 4 * len(answers) > len(examples.dataset):
            return []
    ordered = sorted(answers)
    return [
        (tokenizer.decode(one), tokenizer.decode(other))
        for i, one in enumerate(ordered)
        for other in ordered[i + 1 :]
        if one[:1] == other[:1]
    ]


def lengths(examples: Examples) -> pa.Array:
    """Tokens of each example before truncation."""
    return np.asarray(examples.dataset.select_columns(["whole"]).with_format("numpy")[:]["whole"])


def data_warnings(
    data: DataConfig,
    train: Examples,
    evals: Mapping[str, Examples],
    ends: set[int],
    learned: int,
    common: Mapping[str, int],
    tokenizer,
) -> list[str]:
    """Sentences about the data, each with what to do about it. learned, common: as `ends_learned`, `in_common`."""
    found = []
    total = len(train.dataset)
    named = {name: f"eval.{name}" if name else "eval" for name in evals}
    for which, examples in (("train", train), *((named[name], examples) for name, examples in evals.items())):
        report = examples.report
        if report.truncated:
            longest, loses = int(lengths(examples).max()), "start" if data.prompt is not None else "end"
            loses = f"prompts lose their {loses}" if data.prompt is not None else f"they lose their {loses}"
            found.append(
                f"data.{which}: {report.truncated:,} of {report.examples:,} examples are longer than data.max_length "
                f"{data.max_length}: {loses}. The longest has {longest:,} tokens."
            )
        if report.dropped:
            found.append(
                f"data.{which}: {report.dropped:,} rows are dropped: truncation to data.max_length {data.max_length} "
                "leaves nothing of them to learn."
            )
        if report.skipped_count:
            found.append(f"data.{which}: {report.skipped_count:,} bad rows are skipped; the first: {report.skipped[0]}")
        if report.merged:
            found.append(
                f"data.{which}: in {report.merged:,} examples a token would join the prompt's end and the completion's "
                "beginning. End the prompt without a space, and begin the completion with one."
            )
    if not learned:
        names = ", ".join(printable(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends)) or "none is known"
        found.append(
            f"data.train: no example ends in a supervised end token ({names}): the model won't learn to stop. "
            + ("Look at what the chat template writes after an assistant's turn." if data.messages else "")
        )
    elif learned < total / 2:
        found.append(f"data.train: only {learned:,} of {total:,} examples end in a supervised end token.")
    for name, examples in evals.items():
        if common[name]:
            found.append(
                f"data.{named[name]}: {common[name]:,} of {len(examples.dataset):,} examples are also in data.train, token "
                "for token: the evaluation flatters the adapter. Remove them from one of the two."
            )
    if data.messages is None and data.text is None and (pairs := alike_labels(train, tokenizer)):
        one, other = (printable(text, 30) for text in pairs[0])
        more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
        found.append(
            f'data.completion: the labels "{one}" and "{other}" begin with the same token{more}. eval compares whole '
            "words, but whoever looks at the first token only can't tell them apart. Choose other words if you can."
        )
    return [" ".join(sentence.split()) for sentence in found]
