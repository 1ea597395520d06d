"""Differences of two models on the same rows, against direct computations: permuted resampling, sums over binomials."""

import math

import numpy as np
import pytest

from lora_ft.core.intervals import mcnemar_p, newcombe_interval, student_t
from lora_ft.evaluation.evaluate import compare_with_base
from lora_ft.evaluation.scoring import Scores, macro_f1


def bootstrap(statistic, n: int, resamples: int = 4000) -> tuple[float, float]:
    """The percentile interval of a statistic of drawn rows."""
    generator = np.random.default_rng(7)
    low, high = np.quantile([statistic(generator.integers(n, size=n)) for _ in range(resamples)], [0.025, 0.975])
    return low, high


def two_models(n: int, seed: int = 0) -> tuple[Scores, Scores]:
    """Scores of two models: rows that are hard for one are hard for the other."""
    generator = np.random.default_rng(seed)
    tokens, label, hard = generator.integers(1, 9, n), generator.integers(0, 3, n), generator.gamma(2, 1, n)
    made = []
    for gain in (1.0, 0.8):
        nats = tokens * hard * gain + generator.normal(0, 0.1, n)
        right = generator.random(n) < (0.5 if gain == 1 else 0.7)
        predicted = np.where(right, label, (label + 1) % 3)
        made.append(Scores.of(np.stack([nats, tokens, label, predicted], 1).astype(float), 3))
    return made[0], made[1]


def test_differences_and_intervals_equal_a_direct_computation():
    n = 800
    base, own = two_models(n)
    found = compare_with_base(base.rows, own.rows)
    for key in ("loss", "accuracy", "macro_f1"):
        difference = own.metrics()[key] - base.metrics()[key]
        assert found[f"{key}_vs_base"]["difference"] == pytest.approx(difference, abs=1e-12)
    nats, tokens = own.rows["loss"][:, 0] - base.rows["loss"][:, 0], own.rows["loss"][:, 1]
    loss = bootstrap(lambda i: nats[i].sum() / tokens[i].sum(), n)
    assert found["loss_vs_base"]["ci95"] == pytest.approx(loss, abs=0.02 * (loss[1] - loss[0]) + 0.005)
    right = [scores.rows["accuracy"][:, 0] for scores in (base, own)]
    accuracy = bootstrap(lambda i: (right[1][i] - right[0][i]).mean(), n)
    assert found["accuracy_vs_base"]["ci95"] == pytest.approx(accuracy, abs=0.005)

    def f1(scores: Scores, drawn) -> float:
        counts = np.zeros((3, 3))
        np.add.at(counts, tuple(scores.rows["macro_f1"][drawn].astype(int).T), 1)
        return macro_f1(counts.tolist())

    macro = bootstrap(lambda i: f1(own, i) - f1(base, i), n)
    assert found["macro_f1_vs_base"]["ci95"] == pytest.approx(macro, abs=0.01)
    better, worse = int((right[1] > right[0]).sum()), int((right[1] < right[0]).sum())
    exact = 2 * sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1)) / 2 ** (better + worse)
    entry = found["accuracy_vs_base"]
    assert (entry["better"], entry["worse"]) == (better, worse) and entry["p"] == pytest.approx(exact)


def test_what_all_rows_share_says_nothing_about_the_difference():
    """Two intervals of the losses overlap by far; that of the difference is tight, and is Student's of the rows."""
    base, own = two_models(50)
    shift = Scores.of(np.column_stack([base.rows["loss"] + [0.5, 0.0], base.rows["macro_f1"]]), 3)
    low, high = compare_with_base(base.rows, shift.rows)["loss_vs_base"]["ci95"]
    assert 0 < low <= high < 0.5
    ones = {"rouge_l": np.array([[0.1], [0.4], [0.7]])}, {"rouge_l": np.array([[0.3], [0.5], [1.0]])}
    half = 4.303 * np.std([0.2, 0.1, 0.3], ddof=1) / math.sqrt(3)
    ends = compare_with_base(*ones)["rouge_l_vs_base"]["ci95"]
    assert ends == pytest.approx([0.2 - half, 0.2 + half], abs=1e-4)


@pytest.mark.parametrize("first, second", [(0.5, 0.5), (0.3, 0.6), (0.9, 0.98)])
@pytest.mark.parametrize("n", [20, 100])
def test_the_interval_of_two_shares_covers_what_it_should(n, first, second):
    generator, covered = np.random.default_rng(1), 0
    truth = _share(second) - _share(first)
    for _ in range(250):
        hard = generator.random(n)  # of a row, for both models
        a, b = ((hard + generator.normal(0, 0.1, n)) < share for share in (first, second))
        low, high = newcombe_interval(*(int(x.sum()) for x in (a & b, ~a & b, a & ~b, ~a & ~b)))
        covered += low - 1e-9 <= truth <= high + 1e-9
    assert covered >= 228  # 237.5 expected; three standard deviations are 10


def _share(limit: float) -> float:
    """The chance that a uniform and a normal number (0.1) together stay below a limit."""
    u = (np.arange(20_000) + 0.5) / 20_000
    return float(np.mean([0.5 * (1 + math.erf((limit - x) / (0.1 * math.sqrt(2)))) for x in u]))


def test_few_rows_are_never_certain():
    low, high = newcombe_interval(0, 20, 0, 0)
    assert high == 1.0 and 0.6 < low < 0.9
    assert newcombe_interval(10, 0, 0, 10)[0] < 0 < newcombe_interval(10, 0, 0, 10)[1]
    assert mcnemar_p(0, 0) == 1 and mcnemar_p(5, 5) == 1 and mcnemar_p(0, 6) == pytest.approx(2 / 64)
    one = {"loss": np.array([[2.0, 1.0]])}
    assert compare_with_base(one, one) == {}  # one row has no spread
    assert compare_with_base({}, one) == {} and compare_with_base({"loss": np.ones((2, 2))}, one) == {}


def test_students_t():
    table = {1: 12.706, 15: 2.131, 16: 2.120, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980, 10**6: 1.960}
    assert {n: student_t(n) for n in table} == pytest.approx(table, abs=6e-4)
