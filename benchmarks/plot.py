"""Draw the README's chart, docs/bench.svg, from benchmarks/results.json: `python benchmarks/plot.py`."""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {"peft": "PEFT + Trainer", "grouped": "PEFT, length-grouped", "trl": "TRL, padding-free", "lora-ft": "lora-ft"}
COLOURS = {"peft": "#c9c9c9", "grouped": "#a5a5a5", "trl": "#7f7f7f", "lora-ft": "#2a6fbb"}


def draw(results: dict, path: Path) -> None:
    """Draw tokens per second and peak memory of every row and workload; a line marks the floor."""
    plt.rcParams["svg.hashsalt"] = "lora-ft"
    pieces = results["pieces"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.8 + 0.75 * len(pieces)), sharey=True)
    rows = [row for row in NAMES if any(row in p["rows"] for p in pieces.values())]
    height = 0.8 / len(rows)
    for y, piece in enumerate(pieces.values()):
        for n, row in enumerate(rows):
            runs = piece["rows"].get(row, [])
            if not runs:
                continue
            at, label = y + (n - (len(rows) - 1) / 2) * height, NAMES[row] if y == 0 else None
            speed = statistics.median(r["tokens_per_second"] for r in runs)
            left.barh(at, speed, height * 0.92, color=COLOURS[row], label=label)
            right.barh(at, statistics.median(r["peak_mb"] for r in runs) / 1024, height * 0.92, color=COLOURS[row])
        if runs := piece["rows"].get("floor"):
            speed = statistics.median(r["tokens_per_second"] for r in runs)
            label = "the frozen layers' products alone" if y == 0 else None
            left.plot([speed] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.2, label=label)
    left.set_yticks(range(len(pieces)), list(pieces))
    left.invert_yaxis()
    left.set_xlabel("real tokens per second")
    right.set_xlabel("peak memory of the process, GiB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    here = Path(__file__).parent
    draw(json.loads((here / "results.json").read_text()), here.parent / "docs" / "bench.svg")
