"""Scores against a straight-line oracle: one example at a time through the plain model."""

import math

import datasets
import pytest
import torch

from lora_ft.core.errors import NumbersError
from lora_ft.data.batches import RowPacking, Shard, split_evenly
from lora_ft.distributed import processes
from lora_ft.evaluation.scoring import Scores, macro_f1, score, wilson_interval
from lora_ft.nn import loss
from lora_ft.nn.attention import Isolation
from tests.helpers.families import build, tiny_model, token_ids

EOS = 2


def classification(choices: list[list[int]], n: int = 13) -> datasets.Dataset:
    rows = []
    for i in range(n):
        prompt = token_ids(1, 3 + i % 5, seed=i)[0].tolist()
        label = i % len(choices)
        answer = [*choices[label], EOS]
        rows.append(
            {
                "input_ids": prompt + answer,
                "labels": [-100] * len(prompt) + answer,
                "row": i,
                "where": f"rows.jsonl:{i + 1}",
                "prompt_length": len(prompt),
                "choices": choices,
                "label": label,
            }
        )
    return datasets.Dataset.from_list(rows)


@torch.no_grad()
def oracle(model, dataset) -> tuple[float, int, list[list[int]]]:
    def logprobs(ids):
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    total, count = 0.0, 0
    confusion = [[0] * len(dataset[0]["choices"]) for _ in dataset[0]["choices"]]
    for e in dataset:
        scores = logprobs(e["input_ids"])
        for i in range(1, len(e["labels"])):
            if e["labels"][i] >= 0:
                total, count = total - scores[i - 1, e["labels"][i]].item(), count + 1
        sums = []
        for choice in e["choices"]:
            ids = e["input_ids"][: e["prompt_length"]] + choice
            s = logprobs(ids)
            sums.append(sum(s[e["prompt_length"] - 1 + j, t].item() for j, t in enumerate(choice)))
        if sums:
            confusion[e["label"]][sums.index(max(sums))] += 1
    return total, count, confusion


@pytest.mark.parametrize("choices", [[[5], [6]], [[5, 7], [5, 8, 9], [10]], [[5], [5, 6]]])
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("micro_batch_tokens", [9, 1000])
@pytest.mark.parametrize("chunk", [5, 256])
def test_scores_equal_one_example_at_a_time(family, choices, micro_batch_tokens, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    model, dataset = build(family), classification(choices)
    got = score(model, dataset, Isolation.detect(model, 32), RowPacking(micro_batch_tokens))
    loss_sum, count, confusion = oracle(model, dataset)
    assert (got.examples, got.tokens, got.confusion) == (len(dataset), count, confusion)
    assert got.loss_sum == pytest.approx(loss_sum, rel=1e-5)
    metrics = got.metrics()
    assert metrics["perplexity"] == pytest.approx(math.exp(loss_sum / count), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(sum(confusion[i][i] for i in range(len(confusion))) / len(dataset))


def test_text_has_only_loss_and_perplexity():
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5], "row": 0, "prompt_length": 0, "choices": [], "label": -1}]
    model = build("llama")
    got = score(model, datasets.Dataset.from_list(rows * 2), Isolation.ATTENTION, RowPacking(8))
    assert got.tokens == 4  # nothing stands before a first token
    assert set(got.metrics()) == {"loss", "perplexity"}


def test_a_padded_row_without_supervised_tokens_changes_no_score(monkeypatch):
    """A rank with fewer rows than another computes empty ones, so that all take part in the collectives of a sharded base."""
    model, dataset, rows = build("llama"), classification([[5], [6]]), []
    monkeypatch.setattr(processes, "all_gather", lambda count: [count, count + 2])  # another rank has two rows more
    hook = model.register_forward_pre_hook(lambda _, args, inputs: rows.append(inputs["input_ids"]), with_kwargs=True)
    try:
        padded = score(model, dataset, Isolation.ATTENTION, RowPacking(64), shard=Shard(padded=True))
        count = len(rows)
        assert padded == score(model, dataset, Isolation.ATTENTION, RowPacking(64))
    finally:
        hook.remove()
    assert count == len(rows) - count + 2 and all(row.tolist() == [[0]] for row in rows[count - 2 : count])


def test_scoring_restores_the_mode():
    model = build("gpt2")
    model.train()
    try:
        first = score(model, classification([[5], [6]]), Isolation.ATTENTION, RowPacking(64)).loss_sum
        again = score(model, classification([[5], [6]]), Isolation.ATTENTION, RowPacking(64)).loss_sum
        assert model.training and first == again  # no dropout while scoring
    finally:
        model.eval()


def test_wilson_interval():
    # figures of Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


def test_macro_f1():
    assert macro_f1([[5, 0], [0, 5]]) == 1
    assert macro_f1([[3, 1], [2, 4]]) == pytest.approx((2 * 3 / (4 + 5) + 2 * 4 / (6 + 5)) / 2)
    assert macro_f1([[5, 0], [5, 0]]) == pytest.approx((2 * 5 / 15 + 0) / 2)
    assert macro_f1([[5, 0, 0], [0, 5, 0], [0, 0, 0]]) == 1  # a class that never occurs doesn't count


def test_a_huge_loss_gives_a_finite_perplexity():
    assert math.isfinite(Scores(examples=1, loss_sum=1e6, tokens=1).metrics()["perplexity"])


def test_scores_that_are_not_finite_are_an_error():
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data[7] = float("nan")
    model.train()
    with pytest.raises(NumbersError, match=r"rows\.jsonl:\d+: .*finite"):
        score(model, classification([[5], [6]]), Isolation.ATTENTION, RowPacking(64))
    assert model.training, "left in eval mode"


def test_numbers_that_another_rank_has_not_finite_are_an_error_on_all(monkeypatch):
    model, dataset = build("llama"), classification([[5], [6]])
    mine = split_evenly([len(ids) for ids in dataset["input_ids"]], 2)[0]
    theirs = next(i for i in range(len(dataset)) if i not in mine)

    def add_nan(totals):
        assert not totals[0][theirs].any()
        totals[0][theirs, 0] = math.nan

    monkeypatch.setattr(processes, "all_reduce_sum", add_nan)
    with pytest.raises(NumbersError, match=rf"rows\.jsonl:{theirs + 1}: .*finite"):
        score(model, dataset, Isolation.ATTENTION, RowPacking(64), shard=Shard(0, 2))
