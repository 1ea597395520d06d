"""The rows that a report shows of a classification."""

import numpy as np

from lora_ft.evaluation.telling_rows import SHOWN, telling_rows


def test_rows_are_of_their_kind_and_all_are_counted():
    generator = np.random.default_rng(0)
    label, base, own = generator.integers(0, 3, (3, 200))
    rows = [{"macro_f1": np.stack([label, answer], 1).astype(float)} for answer in (base, own)]
    found = telling_rows(*rows)["rows"]
    kinds = {"fixed": (False, True), "broken": (True, False), "both wrong": (False, False)}
    assert found.keys() == kinds.keys()
    for kind, (base_right, own_right) in kinds.items():
        right = [(bool(b == t), bool(o == t)) for t, b, o in zip(label, base, own, strict=True)]
        assert found[kind]["count"] == right.count((base_right, own_right)) and len(found[kind]["places"]) == SHOWN
        for i, of_base, of_own in found[kind]["places"]:
            assert (of_base, of_own) == (base[i], own[i]) and right[i] == (base_right, own_right)
    (alone,) = telling_rows({}, rows[1])["rows"].items()
    assert alone[0] == "wrong" and alone[1]["count"] == (own != label).sum() and alone[1]["places"][0][1] is None
    assert telling_rows({}, {"loss": np.ones((3, 2))}) == {}
