"""Who has won a comparison, and what a run has gained, in words that the numbers carry."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_ft.commands.compare.display import result_winner
from lora_ft.core.intervals import difference_interval
from lora_ft.report.runs import RunData
from lora_ft.report.scores import headline, score_tables


def compared(metric: str, **values: list[float]) -> dict:
    """A comparison of variants by their values on the seeds 0, 1, ..."""
    variants = [
        {
            "name": name,
            "metrics": {"": {metric: {"mean": sum(of) / len(of), "values": of}}},
            "runs": {str(i): "" for i in range(len(of))},
        }
        for name, of in values.items()
    ]
    return {"metric": ["", metric], "seeds": list(range(len(variants[0]["runs"]))), "variants": variants}


def test_a_winner_is_better_on_the_same_seeds_by_more_than_their_spread():
    """Student's t of 2 degrees of freedom is 4.303: of differences 2.0, 2.1, 2.2 points the interval is 1.85 to 2.35."""
    found = result_winner(compared("accuracy", a=[0.82, 0.921, 0.722], b=[0.80, 0.90, 0.70]))
    assert found["sentence"] == "Winner: a, with accuracy 82.1%." and found["verdict"] == "better"
    assert "b: +2.1 points (95% interval +1.9 to +2.3" in found["detail"] and "3 seeds" in found["detail"]
    found = result_winner(compared("loss", a=[0.5, 0.6, 0.7], b=[0.501, 0.602, 0.703]))
    assert found["sentence"] == "No winner: a has the best loss, 0.6000, but b may be as good."  # -0.0020 +- 0.0025
    found = result_winner(compared("loss", a=[0.5, 0.6, 0.7], b=[0.51, 0.6101, 0.7102]))
    assert found["sentence"].startswith("Winner: a")
    found = result_winner(compared("accuracy", a=[0.82, 0.92, 0.72], b=[0.80, 0.90, 0.70], c=[0.9, 0.7, 0.8]))
    assert found["sentence"].startswith("No winner: a") and "but b, c may" in found["sentence"]  # b without any spread


def test_of_one_seed_the_rows_decide():
    """Two intervals of +-3 and +-4 points make one of +-5 for the difference."""
    assert difference_interval(10, (7, 13), 4, (0, 8)) == pytest.approx((1, 11))
    for ahead, words in ((0.06, "Winner: a"), (0.04, "No winner: a")):
        result = compared("accuracy", a=[0.8 + ahead], b=[0.8])
        for variant, gain, half in zip(result["variants"], (ahead, 0.0), (0.03, 0.04), strict=True):
            entry = {"difference": gain, "ci95": [gain - half, gain + half]}
            variant["vs_base"] = {"": {"accuracy_vs_base": entry}}
        found = result_winner(result)
        assert found["sentence"].startswith(words) and "--seeds" in found["detail"]
        assert f"Against the base, a has +{100 * ahead:.1f} points" in found["detail"]
    unknown = result_winner(compared("accuracy", a=[0.9], b=[0.1]))
    assert unknown["sentence"].startswith("No winner") and "may be chance" in unknown["detail"]


def test_the_interval_of_a_difference_holds_95_times_of_100():
    generator = np.random.default_rng(0)
    a, b = generator.normal(1.0, 2.0, (2000, 30)), generator.normal(0.0, 0.5, (2000, 30))
    held = 0
    for x, y in zip(a, b, strict=True):
        ends = [
            (of.mean() - 2.045 * of.std(ddof=1) / math.sqrt(30), of.mean() + 2.045 * of.std(ddof=1) / math.sqrt(30))
            for of in (x, y)
        ]
        low, high = difference_interval(x.mean(), ends[0], y.mean(), ends[1])
        held += low <= 1.0 <= high
    assert 0.93 < held / 2000 < 0.97


RECORD = {"config": {"data": {"eval": "e"}, "train": {}}, "data": {"eval": {"examples": 100}}}
RUN = RunData(Path("out"), RECORD, [], 5, 5, True, None, {}, {}, [])


def entry(difference: float, low: float, high: float, **more) -> dict:
    return {"difference": difference, "ci95": [low, high], **more}


def test_the_first_sentence_claims_no_more_than_the_interval():
    split = {"better": 8, "worse": 1, "p": 0.039}
    accuracy = {"accuracy": 0.87, "accuracy_vs_base": entry(0.07, 0.01, 0.13, **split)}
    run = replace(RUN, base_metrics={"": {"accuracy": 0.8}}, metrics={"": accuracy})
    assert headline(run)["sentence"] == "Accuracy rose from 80.0% to 87.0%: better than the base."
    words = "+7.0 points on 100 eval examples (95% interval +1.0 to +13.0): rows fixed 8, broken 1"
    assert headline(run)["detail"].startswith(words)
    accuracy["accuracy_vs_base"]["p"] = 0.07
    assert "borderline" in headline(run)["detail"]
    accuracy["accuracy_vs_base"]["ci95"] = [-0.01, 0.13]
    assert headline(run)["sentence"].startswith("No certain change") and "chance" in headline(run)["sentence"]
    del accuracy["accuracy_vs_base"]
    assert headline(run)["verdict"] == "" and "unknown" in headline(run)["detail"]
    assert "what was gained is unknown" in headline(replace(run, base_metrics={}))["detail"]
    assert headline(RUN)["sentence"] == "Not evaluated."


def test_perplexity_has_the_verdict_of_the_loss_and_nothing_uncompared_has_one():
    own = {"loss": 1.0, "perplexity": 2.718, "loss_vs_base": entry(-0.1, -0.3, 0.1)}
    run = replace(RUN, base_metrics={"": {"loss": 1.1, "perplexity": 3.004}}, metrics={"": own})
    ((loss, perplexity),) = (set_["rows"] for set_ in score_tables(run))
    assert loss["change"]["verdict"] == perplexity["change"]["verdict"] == "uncertain"
    del own["loss_vs_base"]
    ((loss, perplexity),) = (set_["rows"] for set_ in score_tables(run))
    assert loss["change"] == {"text": "-0.1000", "interval": "", "verdict": ""} and not perplexity["change"]["verdict"]
