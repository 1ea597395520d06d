"""Axes that don't exaggerate, names at the dots, confusion tables of many labels."""

import random
import re
from pathlib import Path

from lora_ft.report.charts import Line, chart, ticks, y_range
from lora_ft.report.curves import run_charts
from lora_ft.report.labels import CHARACTER, HEIGHT, LEFT, RIGHT, place_labels
from lora_ft.report.runs import RunData
from lora_ft.report.write import report_page


def test_an_axis_holds_its_values_and_makes_no_mountain_of_a_molehill():
    generator = random.Random(0)
    for _ in range(500):
        full = generator.choice([1.0, 100.0, None])
        ends = sorted(generator.uniform(0, full or 10 ** generator.randint(-3, 6)) for _ in range(2))
        low, high = y_range(*ends, full)
        assert low <= ends[0] and ends[1] <= high and (full is None or high <= full), (ends, low, high)
        assert {low, high} - {full} <= {*ticks(low, high)}, "the ends have a tick"
        assert high - low >= 0.2499 * (full or ends[1]) and low >= 0
        assert low == 0 or low > 0.4 * ends[1], "a start close to 0 is 0"
    assert y_range(0.801, 0.854, 1.0) == (0.7, 1.0)
    assert y_range(2.0, 2.0)[0] < 2.0 < y_range(2.0, 2.0)[1] and y_range(0.0, 0.0)[1] > 0
    assert y_range(2100, 2136, None, True)[0] == 0


def test_names_at_dots_cover_neither_each_other_nor_leave_the_plot():
    generator = random.Random(1)
    dots = [(f"variant {i}", generator.uniform(LEFT, RIGHT), generator.uniform(20, 60)) for i in range(8)]
    boxes = []
    for label in place_labels(dots):
        width = len(label.text) * CHARACTER
        left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
        assert left >= LEFT - 1 and left + width <= RIGHT + 9
        boxes.append((left, label.y - 4 - HEIGHT / 2, left + width, label.y - 4 + HEIGHT / 2))
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    overlaps = [max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1])) for a, b in pairs]
    assert max(overlaps) < 1
    assert place_labels([None, ("x" * 99, 60.0, 60.0)])[1].text.endswith("\u2026")


def test_a_dot_has_its_interval_and_its_name():
    lines = [Line(n, [(x, 0.5)], "run-1", True, {x: (0.4, 0.6)}, named=True) for n, x in (("a", 1.0), ("b", 2.0))]
    drawn = chart("accuracy", lines, full_scale=1.0)
    for line in drawn.lines:
        ((x, top, bottom),), ((dot_x, y, tooltip),) = line.whiskers, line.dots
        assert x == dot_x and top < y < bottom and line.label.text == line.name and "0.4 to 0.6" in tooltip


RECORD = {
    "config": {"data": {"eval": "e", "label_names": {"label": [f"label {i}" for i in range(20)]}}, "train": {}}
    | {"adapter": {"method": "lora", "rank": 4, "alpha": 8, "targets": ["q"], "modules": []}},
    "base": {"name": "b"},
    "data": {"eval": {"examples": 40}},
}


def test_an_accuracy_curve_has_wilsons_interval():
    log = [{"step": 5, "eval_accuracy": 0.5}, {"step": 9, "eval_accuracy": 0.75}]
    (drawn,) = run_charts(RunData(Path("out"), RECORD, log, 9, 9, False, None, {}, {}, []))
    texts = [tooltip for _, _, tooltip in drawn.lines[-1].dots]
    assert "50.0% (35.2% to 64.8%)" in texts[0], texts  # Wilson's interval of 20 of 40


def test_many_labels_have_numbers_a_table_and_what_is_mixed_up():
    counts = [[9 if i == j else 0 for j in range(20)] for i in range(20)]
    counts[3][7] = 5
    metrics = {"": {"accuracy": 0.9, "confusion": counts}}
    page = report_page(RunData(Path("out"), RECORD, [], 9, 9, False, None, metrics, metrics, []))
    assert "label 3 → label 7" in page and page.count("→ label") == 1
    assert len(re.findall(r'<th scope="col" aria-label="label \d+">\d+</th>', page)) == 2 * 20
    assert len(re.findall(r'<td class="right"', page)) == 2 * 20
    for level, after in (("1", "2"), ("2", "23"), ("3", "234"), ("4", "234")):  # no level is skipped
        headings = re.findall(r"<h(\d)", page)
        assert all(b in after for a, b in zip(headings, headings[1:], strict=False) if a == level)
