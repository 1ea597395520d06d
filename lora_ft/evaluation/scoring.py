"""Scores of a model on encoded examples: loss and perplexity per supervised token, and accuracy of classifications.

A classification compares the label words' summed log-probabilities after the prompt, without end-of-sequence (as
lm-evaluation-harness does).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lora_ft.core.errors import NumbersError
from lora_ft.core.intervals import wilson_interval
from lora_ft.core.messages import working
from lora_ft.data.batches import EMPTY_EXAMPLE, UNSHARDED, MicroBatch, RowPacking, Shard, micro_batch, split_evenly
from lora_ft.distributed import processes
from lora_ft.evaluation.paired import Rows
from lora_ft.nn.adapted import eval_mode
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import log_probabilities
from lora_ft.nn.rows import flat_row

Compute = Callable[[Iterable[MicroBatch]], Iterable[Tensor]]  # rows -> of each, what `log_probabilities` gives


@dataclass
class Scores:
    """loss_sum: cross-entropy in nats over all supervised `tokens`. confusion[true][predicted]: a classification's examples.

    rows: what each example contributes to each metric.
    """

    examples: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    confusion: list[list[int]] = field(default_factory=list)
    rows: Rows = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, rows: np.ndarray, choices: int) -> "Scores":
        """Of one row (nats, tokens, label, predicted) per example; the last two count only where there are choices."""
        scores = cls(len(rows), float(rows[:, 0].sum()), int(rows[:, 1].sum()), rows={"loss": rows[:, :2]})
        if choices:
            pairs = rows[:, 2:].astype(int)
            scores.confusion = confusion_of(pairs, choices)
            scores.rows |= {"accuracy": (pairs[:, :1] == pairs[:, 1:]).astype(float), "macro_f1": pairs.astype(float)}
        return scores

    def metrics(self) -> dict:
        """loss, perplexity; of a classification also accuracy with its 95% interval (Wilson), macro-F1 and confusion."""
        loss = self.loss_sum / self.tokens
        metrics: dict = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
        if not self.confusion:
            return metrics
        correct = sum(row[i] for i, row in enumerate(self.confusion))
        metrics |= {"accuracy": correct / self.examples, "accuracy_ci95": list(wilson_interval(correct, self.examples))}
        return metrics | {"macro_f1": macro_f1(self.confusion), "confusion": self.confusion}


def confusion_of(pairs: np.ndarray, choices: int) -> list[list[int]]:
    """confusion[true][predicted] of rows (true, predicted)."""
    cells = pairs[:, 0].astype(int) * choices + pairs[:, 1].astype(int)
    return np.bincount(cells, minlength=choices * choices).reshape(choices, choices).tolist()


def macro_f1(confusion: list[list[int]]) -> float:
    """Mean F1 over the classes that occur as true or predicted label; 0 for a class that is never predicted correctly."""
    totals = [sum(row) + sum(r[c] for r in confusion) for c, row in enumerate(confusion)]  # true + predicted
    return fmean(2 * confusion[c][c] / total for c, total in enumerate(totals) if total)


@dataclass(frozen=True)
class _Query:
    """Asks for the log-probabilities of `targets[i]` as the token after position `positions[i]` of a sequence."""

    example: int
    choice: int  # -1: the loss; else the choice that the targets spell
    ids: list[int]
    positions: list[int]
    targets: list[int]


def _queries(index: int, example: dict) -> Iterator[_Query]:
    ids, labels = example["input_ids"], example["labels"]
    positions = [i - 1 for i in range(1, len(labels)) if labels[i] >= 0]
    yield _Query(index, -1, ids, positions, [labels[i + 1] for i in positions])
    prompt = ids[: example["prompt_length"]]
    assert prompt or not example["choices"], "a label word is scored after its prompt"
    for c, choice in enumerate(example["choices"]):
        positions = [len(prompt) - 1 + i for i in range(len(choice))]
        shared = len(choice) == 1 or ids[len(prompt) : len(prompt) + len(choice)] == choice  # with the loss
        yield _Query(index, c, ids if shared else [*prompt, *choice], positions, choice)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    isolation: Isolation,
    packing: RowPacking,
    check: Callable[[], None] = lambda: None,
    shard: Shard = UNSHARDED,
    compute: Compute | None = None,
) -> Scores:
    """Score `model`, in eval mode meanwhile, on the encoded examples of `dataset` (see `Examples`).

    packing: how sequences share rows. check: called before each row; an exception in it stops the scoring. shard: this
    rank's part of the examples; the scores returned are those of all ranks. compute: computes rows in the model's place, shows
    the progress, and does without `check`. Raises NumbersError if a log-probability is NaN or infinite.
    """
    choices = len(dataset[0]["choices"]) if len(dataset) else 0
    # of each example: nats, tokens, label, predicted; 0 where another rank has them
    values = np.zeros((len(dataset), 4))
    block = 256 * shard.world_size  # examples sorted by length at a time: well-filled rows in constant memory
    bar = tqdm(total=len(dataset), desc="evaluating", unit="rows", leave=False, delay=2, disable=compute and True)

    def compute_alone(rows: Iterable[MicroBatch]) -> Iterator[Tensor]:
        for row in rows:
            check()
            inputs = {key: x.to(model.device) for key, x in row.items() if isinstance(x, Tensor)}
            with isolation.row(model, row["segments"]):
                found = log_probabilities(model, **inputs)
            yield found

    with eval_mode(model), bar, nullcontext() if compute else working("evaluating"):
        for start in range(0, len(dataset), block):
            lengths = [len(ids) for ids in dataset[start : start + block]["input_ids"]]
            places = [start + i for i in split_evenly(lengths, shard.world_size)[shard.rank]]
            examples = [dataset[i] for i in places]
            by_sequence: dict[tuple[int, tuple[int, ...]], list[_Query]] = {}
            for query in itertools.chain.from_iterable(_queries(i, example) for i, example in enumerate(examples)):
                by_sequence.setdefault((query.example, tuple(query.ids)), []).append(query)
            sequences = list(by_sequence.values())
            choice_logprobs = [[0.0] * len(e["choices"]) for e in examples]
            rows = [[sequences[i] for i in row] for row in packing.rows([s[0].ids for s in sequences])]
            asked, not_finite = (_asked(row, packing.share) for row in rows), []
            for row, computed in zip(rows, (compute or compute_alone)(asked), strict=True):
                of_row = iter(computed.tolist())
                for query in itertools.chain.from_iterable(row):
                    logprobs = list(itertools.islice(of_row, len(query.targets)))
                    if not all(map(math.isfinite, logprobs)):
                        not_finite.append(places[query.example])
                    if query.choice < 0:
                        values[places[query.example], :2] = -sum(logprobs), len(logprobs)
                    else:
                        choice_logprobs[query.example][query.choice] = sum(logprobs)
                bar.update(sum(queries[0].choice < 0 for queries in row))  # an example has one sequence with its loss
            for place, example, found in zip(places, examples, choice_logprobs, strict=True):
                if found:
                    values[place, 2:] = example["label"], max(range(len(found)), key=found.__getitem__)
            values[not_finite, 0] = math.nan
            if shard.world_size == 1:
                _check_finite(values, dataset)
            missing = max(processes.all_gather(len(rows))) - len(rows) if shard.padded else 0
            for _ in compute_alone([micro_batch([EMPTY_EXAMPLE])] * missing):
                pass
            bar.update(start + len(lengths) - bar.n)  # those of other ranks
    if shard.world_size > 1:
        totals = torch.from_numpy(values).to(model.device)
        processes.all_reduce_sum([totals])
        values = totals.cpu().numpy()
        _check_finite(values, dataset)  # on all ranks alike: of several runs, each has to end on all
    return Scores.of(values, choices)


def _check_finite(values: np.ndarray, dataset: datasets.Dataset) -> None:
    """Raise NumbersError, with the place of the first example whose values are not finite."""
    if len(wrong := np.flatnonzero(~np.isfinite(values[:, 0]))):
        problem = "the model's log-probabilities are not finite, so scores mean nothing"
        raise NumbersError(f"{dataset[int(wrong[0])]['where']}: {problem}.")


def _asked(row: list[list[_Query]], share: bool) -> MicroBatch:
    """A row of sequences, each with the queries about it: its `keep` and `targets` are those of the queries, in order."""
    flat = flat_row([queries[0].ids for queries in row], share)
    places = [places[q.positions] for places, queries in zip(flat.places, row, strict=True) for q in queries]
    targets = [target for queries in row for q in queries for target in q.targets]
    wanted = {"keep": torch.cat(places), "targets": torch.tensor(targets, dtype=torch.long)}
    return MicroBatch(**flat.inputs, **wanted, segments=flat.segments)  # type: ignore[typeddict-item]
