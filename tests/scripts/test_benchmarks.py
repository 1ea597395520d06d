"""The benchmark's own parts that no other test runs, on a tiny model: its figures take an hour, its code a second."""

import sys
from pathlib import Path

import pytest

from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.methods.lora.inject import inject_lora
from tests.helpers.families import tiny_model
from tests.training.test_trainer import corpus


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import rows

    yield rows
    for name in ("rows", "workloads", "peft_trainer"):
        sys.modules.pop(name, None)


def test_the_floor_has_the_products_of_each_step(rows):
    model, plan = tiny_model("llama"), StepPlan(corpus(), 4, 1, 2, RowPacking(64), 0)
    inject_lora(model, rank=2)
    seconds, flops = rows.floor(model, plan, 2)
    assert len(seconds) == len(flops) == 2 and min(seconds) > 0
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj" in n and not p.requires_grad)
    for step, count in enumerate(flops):  # forward at least, and not more than all weights forward, backward and again
        tokens = plan[step]["tokens"]
        assert 2 * tokens * weights < count < 8 * tokens * model.num_parameters()
