"""What looks wrong with a run's data, though training accepts it: the counts, and for each a sentence with what to do."""

import itertools
from collections import Counter
from collections.abc import Iterator
from string import ascii_uppercase

import datasets
import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_ft.config.schema import DataConfig
from lora_ft.core.messages import printable
from lora_ft.data.cache import column_batches
from lora_ft.data.chats.format import end_tokens
from lora_ft.data.cuts import LOST, LOST_OF_CHATS
from lora_ft.data.examples import Examples, column_array
from lora_ft.data.prepare import find_chat
from lora_ft.training.setup import RunSetup

FEW_LABELS = 20  # a data set with at most this many distinct completions has labels of a classification


def ends_learned(examples: Examples, ends: set[int]) -> int:
    """How many examples have an end token as their last supervised token, and so teach generation to stop."""
    learned = 0
    for labels, row_ends in _lists(examples.dataset, "labels"):
        supervised = np.flatnonzero(labels >= 0)
        up_to = np.searchsorted(supervised, row_ends)  # how many are in a row and those before it
        last = supervised[up_to[np.diff(up_to, prepend=0) > 0] - 1]
        learned += int(np.isin(labels[last], list(ends)).sum())
    return learned


def in_common(train: Examples, evaluation: Examples) -> int:
    """How many eval examples have exactly the tokens of a training example."""
    wanted = Counter(ids.tobytes() for ids in _rows(evaluation.dataset, "input_ids"))  # usually the smaller set
    return sum(wanted.pop(ids.tobytes(), 0) for ids in _rows(train.dataset, "input_ids"))


def _rows(dataset: datasets.Dataset, column: str) -> Iterator[np.ndarray]:
    """The lists of a column, one by one."""
    for values, ends in _lists(dataset, column):
        yield from map(values.__getitem__, map(slice, [0, *ends[:-1].tolist()], ends.tolist()))


def _lists(dataset: datasets.Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A column of lists by batches: their values one after another, and where in these each list ends."""
    for lists in column_batches(dataset, column):
        values, lengths = (array.to_numpy(zero_copy_only=False) for array in (lists.flatten(), lists.value_lengths()))
        yield values, np.cumsum(lengths)


def labels_sharing_a_first_token(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Pairs of labels that share a first token; labels are label words, or completions if there are only a few."""
    if examples.label_words:
        answers = {tuple(choice) for choice in examples.dataset[0]["choices"]}
    else:
        answers = set()
        for labels in _rows(examples.dataset, "labels"):
            answers.add(tuple(labels[labels >= 0].tolist()))
            if len(answers) > FEW_LABELS:
                return []
        if 4 * len(answers) > len(examples.dataset):
            return []
    pairs = [(a, b) for a, b in itertools.combinations(sorted(answers), 2) if a[:1] == b[:1]]
    return [(tokenizer.decode(a), tokenizer.decode(b)) for a, b in pairs]


def lengths(examples: Examples) -> np.ndarray:
    """Tokens of each example before truncation."""
    return column_array(examples.dataset, "full_length")


def examine_data(setup: RunSetup, generation: GenerationConfig) -> tuple[int, dict[str, int], list[str]]:
    """`ends_learned` in train, eval set -> `in_common` with train, and warnings. generation: the base's settings."""
    data, train, tokenizer, result = setup.config.data, setup.train_set, setup.tokenizer, []
    ends = end_tokens(tokenizer, generation, find_chat(data, tokenizer))
    base_ends = end_tokens(tokenizer, generation, chat=None)
    learned, total = ends_learned(train, ends), len(train.dataset)
    common = {name: in_common(train, examples) for name, examples in setup.eval_sets.items()}
    named = {f"eval.{name}".rstrip("."): examples for name, examples in setup.eval_sets.items()}
    for which, examples in {"train": train, **named}.items():
        report = examples.report
        if report.truncated:
            longest = int(lengths(examples).max())
            lost = LOST_OF_CHATS[data.truncate] if data.messages else LOST[data.truncate]
            lost = "they are cut at the end" if data.text is not None else lost
            result.append(
                f"data.{which}: {report.truncated:,} of {report.examples:,} examples are longer than data.max_length "
                f"{data.max_length}: {lost}. The longest has {longest:,} tokens."
            )
        if report.dropped:
            result.append(
                f"data.{which}: {report.dropped:,} rows are dropped: truncation to data.max_length {data.max_length} "
                "leaves nothing to learn from."
            )
        if report.skipped_count:
            result.append(
                f"data.{which}: {report.skipped_count:,} bad rows are skipped; the first: {report.skipped[0]}"
            )
        result += [f"data.{which}: {note}." for note in report.notes]
        if endless := report.turn_ends.get(""):
            result.append(
                f"data.{which}: the chat template ends {endless:,} of {sum(report.turn_ends.values()):,} supervised turns "
                "with no token; only the others teach the model to stop."
            )
        if report.merged:
            result.append(
                f"data.{which}: in {report.merged:,} examples the end of the prompt and the start of the completion would "
                "merge into one token. End the prompt without a space, and start the completion with one."
            )

    def names(ids: set[int]) -> str:
        return ", ".join(printable(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ids)) or "none known"

    if not learned:
        result.append(
            f"data.train: no example ends in a supervised end token ({names(ends)}): the model will not learn to stop. "
            + ("Check what the chat template writes after an assistant turn." if data.messages else "")
        )
    elif not ends_learned(train, base_ends):
        result.append(
            f"data.train: no example ends in the base's own end token ({names(base_ends)}), only in the one that closes a "
            f"turn of the chat template ({names(ends - base_ends)}). lora-ft stops there; make other tools stop there too."
        )
    elif learned < total / 2:
        result.append(f"data.train: only {learned:,} of {total:,} examples end in a supervised end token.")
    for (which, examples), shared in zip(named.items(), common.values(), strict=True):
        if shared:
            result.append(
                f"data.{which}: {shared:,} of {len(examples.dataset):,} examples are also in data.train, token "
                "for token, which makes the adapter look better than it is. Remove them from one of the two."
            )
    if data.messages is None and data.text is None and (pairs := labels_sharing_a_first_token(train, tokenizer)):
        first, second = (printable(text, 30) for text in pairs[0])
        more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
        result.append(
            f'data.completion: the labels "{first}" and "{second}" share a first token{more}. eval compares complete '
            "words, but tools that look at the first token only can't tell them apart. Choose other words if you can."
        )
    result += placeholder_words(data)
    return learned, common, [sentence.strip() for sentence in result]


def placeholder_words(data: DataConfig) -> list[str]:
    """A warning if label words are the letters that `init` writes for ids, and not those of choices in the prompt."""
    result = []
    for column, words in (data.label_names or {}).items():
        if list(words) == list(ascii_uppercase[: len(words)]) and "A. " not in (data.prompt or ""):
            result.append(
                f"data.label_names: {printable(column)} has letters for its classes, which mean nothing to the base. Replace "
                "them by words for the ids, in their order, as in [negative, positive]: the adapter needs fewer rows then."
            )
    return result
