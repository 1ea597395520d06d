"""Which examples make up a step, and how a step is packed."""

import datasets
import pytest
import torch

from lora_ft.data.batches import RowPacking, StepPlan, micro_batch
from lora_ft.nn.rows import flat_row


def corpus(n: int = 23) -> datasets.Dataset:
    rows = []
    for i in range(n):
        ids = [100 * i + j for j in range(3 + i % 5)]
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100, *ids[1:]],
                "tokens": len(ids),
                "supervised": len(ids) - 1,
                "where": f"rows:{i}",
            }
        )
    return datasets.Dataset.from_list(rows)


def plan(micro_batch_tokens=16, batch_size=4, epochs=2.0, max_steps=None, seed=0, n=23, alone=False) -> StepPlan:
    return StepPlan(corpus(n), batch_size, epochs, max_steps, RowPacking(micro_batch_tokens, alone), seed)


def test_an_epoch_uses_every_example_once_and_each_epoch_is_shuffled():
    p = plan()
    assert len(p) == 12  # 2 x ceil(23 / 4)
    first, second = ([i for s in range(a, a + 6) for i in p.examples(s)] for a in (0, 6))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


def test_a_step_depends_only_on_seed_and_number():
    a, b = plan(), plan()
    for step in (7, 2, 11, 0):  # in any order, as after a resume
        assert a.examples(step) == b.examples(step)
    assert plan(seed=1).examples(0) != a.examples(0)


def test_packing_does_not_change_the_examples_of_a_step():
    fine, coarse, alone = plan(8), plan(10_000), plan(8, alone=True)
    for step in range(len(fine)):
        assert sorted(fine[step]["rows"]) == sorted(coarse[step]["rows"]) == sorted(alone[step]["rows"])
        assert fine[step]["total"] == coarse[step]["total"] == alone[step]["total"]
        assert len(coarse[step]["micro"]) == 1
        assert all(len(m["segments"]) == 1 for m in alone[step]["micro"])


@pytest.mark.parametrize("limit", [4, 7, 9, 100])
def test_rows_have_at_most_micro_batch_tokens_unless_one_example_is_longer(limit):
    lengths = [3, 9, 4, 4, 8, 1, 2, 7]
    rows = RowPacking(limit).rows([range(n) for n in lengths])
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= limit or len(row) == 1


def test_a_micro_batch_keeps_the_positions_before_supervised_tokens():
    m = micro_batch(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
            {"input_ids": [8, 9, 10, 11], "labels": [8, 9, -100, 11]},  # no token before 8 predicts it
        ]
    )
    assert m["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert m["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert m["keep"].tolist() == [1, 3, 5]
    assert m["targets"].tolist() == [7, 9, 11]
    assert torch.equal(m["input_ids"][0, m["keep"] + 1], m["targets"])


def test_max_steps_overrides_epochs_and_may_exceed_them():
    assert len(plan(max_steps=3)) == 3
    long = plan(max_steps=100)
    assert len(long) == 100 and long.examples(99)
    assert plan(epochs=0.5).steps == 3
    assert plan().epoch_at(6) == 1.0 and plan().epoch_at(3) == pytest.approx(12 / 23)


def test_rows_are_as_few_as_fit_and_of_similar_size():
    lengths = [30, 9, 14, 22, 5, 18, 27, 11, 8, 16]  # 160
    rows = RowPacking(64).rows([range(n) for n in lengths])
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert len(rows) == 3 and max(sums) - min(sums) <= 5


def test_virtual_tokens_are_not_counted():
    with_two_more = corpus().map(lambda e: {"input_ids": [0, 0, *e["input_ids"]], "labels": [-100, -100, *e["labels"]]})
    step, longer = (StepPlan(data, 4, 1, None, RowPacking(64), 0)[0] for data in (corpus(), with_two_more))
    assert (longer["tokens"], longer["total"]) == (step["tokens"], step["total"])
    for s in (step, longer):
        assert sum(len(m["keep"]) for m in s["micro"]) == s["total"]


@pytest.mark.parametrize("limit", [60, 100, 10_000])
def test_examples_that_begin_alike_come_together_in_rows_that_fit(limit):
    heads = [list(range(40)), list(range(100, 130))]
    examples = [heads[i % 2] + [1000 + i] * 5 for i in range(8)] + [[2000, 2001]]
    packing = RowPacking(limit, share=True)
    rows = packing.rows(examples)
    assert sorted(i for row in rows for i in row) == list(range(9))
    sizes = [flat_row([examples[i] for i in row], share=True).input_ids.numel() for row in rows]
    assert max(sizes) <= limit and sum(sizes) < sum(map(len, examples)) / 1.4
    if limit == 10_000:
        assert sizes == [40 + 30 + 8 * 5 + 2]
    apart = RowPacking(limit).rows(examples)
    assert all(sum(len(examples[i]) for i in row) <= limit for row in apart)


def test_a_shared_token_is_supervised_once_for_each_example():
    head = list(range(20))
    rows = [{"input_ids": [*head, 30 + i], "labels": [-100] * 19 + [19, 30 + i]} for i in range(3)]
    m = micro_batch(rows, share=True)
    assert m["input_ids"].numel() == 23 and m["keep"].tolist() == [18, 19] * 3
    assert m["targets"].tolist() == [19, 30, 19, 31, 19, 32]
