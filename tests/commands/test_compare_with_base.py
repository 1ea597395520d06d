"""A comparison's variants against the base, on the same rows."""

from lora_ft.commands.compare.display import base_tables
from lora_ft.commands.compare.results import compared_with_base

ENTRY = {"difference": 0.125, "ci95": [0.05, 0.2], "better": 9, "worse": 1, "p": 0.02}
RECORD = {
    "config": {"data": {"eval": {"dev": "a", "other": "b"}}},
    "metrics": {"dev_accuracy": 0.9, "dev_accuracy_vs_base": ENTRY, "other_accuracy": 0.5},
}


def test_the_first_run_is_compared_by_eval_set():
    found = compared_with_base(RECORD)
    assert found == {"dev": {"accuracy_vs_base": ENTRY}, "other": {}}
    metrics = {name: {"accuracy": {"mean": 0.9, "values": [0.9]}} for name in ("dev", "other")}
    unsure = {"dev": {"accuracy_vs_base": ENTRY | {"ci95": [-0.1, 0.2]}}}
    variants = [
        {"name": "lora", "metrics": metrics, "vs_base": found},
        {"name": "full", "metrics": metrics, "vs_base": unsure},
        {"name": "of an earlier version", "metrics": metrics},
    ]
    (table,) = base_tables({"metric": ["dev", "accuracy"], "variants": variants})
    assert table.title == "dev" and [row.name for row in table.rows] == ["lora", "full"]
    assert table.rows[0].cells == ["+12.5 points (+5.0 to +20.0), better"]
    assert table.rows[1].cells == ["+12.5 points (-10.0 to +20.0), uncertain"]
