"""Scores of a model on encoded examples: loss and perplexity per supervised token, and accuracy of classifications.

A classification compares the label words' summed log-probabilities after the prompt, without end-of-sequence (as
lm-evaluation-harness does).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

import datasets
import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lora_ft.core.errors import NumbersError
from lora_ft.core.intervals import wilson_interval
from lora_ft.core.messages import working
from lora_ft.data.batches import EMPTY_EXAMPLE, UNSHARDED, RowPacking, Shard, split_evenly
from lora_ft.distributed import processes
from lora_ft.evaluation.paired import Rows
from lora_ft.nn.adapted import eval_mode
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import logits_in_chunks
from lora_ft.nn.rows import flat_row


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
) -> Scores:
    """Score `model`, in eval mode meanwhile, on the encoded examples of `dataset` (see `Examples`).

    packing: how sequences share rows. check: called before each row; an exception in it stops the scoring. shard: this
    rank's part of the examples; the scores returned are those of all ranks. Raises NumbersError if a log-probability is NaN
    or infinite.
    """
    choices = len(dataset[0]["choices"]) if len(dataset) else 0
    values = np.zeros(
        (len(dataset), 4)
    )  # of each example: nats, tokens, label, predicted; 0 where another rank has them
    block = 256 * shard.world_size  # examples sorted by length at a time: well-filled rows in constant memory
    bar = tqdm(total=len(dataset), desc="evaluating", unit="rows", leave=False, delay=2, disable=None)
    with eval_mode(model), bar, working("evaluating"):
        for start in range(0, len(dataset), block):
            lengths = [len(ids) for ids in dataset[start : start + block]["input_ids"]]
            places = [start + i for i in split_evenly(lengths, shard.world_size)[shard.rank]]
            examples = [dataset[i] for i in places]
            by_sequence: dict[tuple[int, tuple[int, ...]], list[_Query]] = {}
            for query in itertools.chain.from_iterable(_queries(i, example) for i, example in enumerate(examples)):
                by_sequence.setdefault((query.example, tuple(query.ids)), []).append(query)
            sequences = list(by_sequence.values())
            choice_logprobs = [[0.0] * len(e["choices"]) for e in examples]
            rows = packing.rows([s[0].ids for s in sequences])
            for row in rows:
                check()
                for query, logprobs in _log_probabilities(model, isolation, [sequences[i] for i in row], packing.share):
                    if not all(map(math.isfinite, logprobs)):
                        problem = "the model's log-probabilities are not finite, so scores mean nothing"
                        raise NumbersError(f"{examples[query.example]['where']}: {problem}.")
                    if query.choice < 0:
                        values[places[query.example], :2] = -sum(logprobs), len(logprobs)
                    else:
                        choice_logprobs[query.example][query.choice] = sum(logprobs)
                bar.update(sum(sequences[i][0].choice < 0 for i in row))  # an example has one sequence with its loss
            for place, example, found in zip(places, examples, choice_logprobs, strict=True):
                if found:
                    values[place, 2:] = example["label"], max(range(len(found)), key=found.__getitem__)
            for _ in range(max(processes.all_gather(len(rows))) - len(rows) if shard.padded else 0):
                empty = [[_Query(0, -1, EMPTY_EXAMPLE["input_ids"], [], [])]]
                list(_log_probabilities(model, isolation, empty, packing.share))
            bar.update(start + len(lengths) - bar.n)  # those of other ranks
    if shard.world_size > 1:
        totals = torch.from_numpy(values).to(model.device)
        processes.all_reduce_sum([totals])
        values = totals.cpu().numpy()
    return Scores.of(values, choices)


def _log_probabilities(
    model: PreTrainedModel, isolation: Isolation, row: list[list[_Query]], share: bool
) -> Iterator[tuple[_Query, list[float]]]:
    """The queries of one row of sequences (queries of the same sequence are grouped), each with its log-probabilities."""
    flat = flat_row([queries[0].ids for queries in row], share)
    queries = [query for same in row for query in same]
    positions = torch.cat([places[q.positions] for places, same in zip(flat.places, row, strict=True) for q in same])
    wanted = [target for q in queries for target in q.targets]
    targets = torch.tensor(wanted, dtype=torch.long)  # (wanted,), as `positions`
    keep, kept_rows = positions.unique(return_inverse=True)  # (kept,), (wanted,)
    inputs = {name: x.to(model.device) for name, x in {**flat.inputs, "keep": keep}.items()}
    targets, kept_rows = targets.to(model.device), kept_rows.to(model.device)
    logprobs, start = torch.empty(len(targets), device=model.device), 0
    with isolation.row(model, flat.segments):
        for logits in logits_in_chunks(model, **inputs):  # (chunk, vocabulary)
            here = ((kept_rows >= start) & (kept_rows < start + len(logits))).nonzero()[:, 0]
            at = kept_rows[here] - start
            logprobs[here] = logits[at, targets[here]].float() - logits.float().logsumexp(-1)[at]
            start += len(logits)
    values = iter(logprobs.tolist())
    yield from ((query, list(itertools.islice(values, len(query.targets)))) for query in queries)
