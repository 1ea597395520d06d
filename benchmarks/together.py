"""Eight configs trained together against the same eight one after the other: whole processes, half of those before, half after.

    python benchmarks/together.py [--sst2 FILE] [--batches 4,16] [--steps 40] [--rounds 3] [--eval-rows 200]

The runs differ in rank (4 to 64), learning rate, seed and order of the data, and have a batch size in common. Prints a line of
JSON per batch size: seconds of each round both ways, the median of their ratios and its range, peak memory, and how far losses
and adapters are apart. Each run evaluates the base and its last step on --eval-rows rows; the base's scores are kept for all
runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from bench import machine
from safetensors.torch import load_file
from workloads import add_sources, write_data

RANKS = (4, 8, 16, 32, 64, 8, 8, 8)
RATES = (1e-3, 1e-3, 5e-4, 5e-4, 2e-4, 2e-3, 3e-4, 1e-4)


def config(model: str, number: int, batch_size: int, steps: int, evaluates: bool, output: Path) -> dict:
    """The config of a run."""
    rank, train = RANKS[number], {"report_to": [], "logging_steps": 1}
    train |= {"batch_size": batch_size, "max_steps": steps, "save_steps": steps}
    train |= {"evaluate_base": True, "eval_steps": steps} if evaluates else {}
    return {
        "model": {"name": model},
        "adapter": {"rank": rank, "alpha": 2 * rank},
        "data": {
            "train": "train.jsonl",
            "eval": "eval.jsonl" if evaluates else None,
            "prompt": "Review: {sentence}\nSentiment:",
            "completion": " {label}",
            "label_names": {"label": ["negative", "positive"]},
        },
        "train": train | {"learning_rate": RATES[number], "seed": number},
        "output": str(output),
    }


def train(folder: Path, names: list[str]) -> float:
    """Seconds that `lora-ft train NAMES` takes in `folder`, with a cache of its own."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lora_ft", "train", *names]
    subprocess.run(command, cwd=folder, env=os.environ | {"HF_HOME": str(folder)}, check=True, capture_output=True)
    return time.perf_counter() - started


def round_of(model: str, rows: list[str], batch_size: int, steps: int, eval_rows: int) -> dict:
    """One round: seconds and peak memory both ways, and the largest differences of losses and adapters."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "eval.jsonl").write_text("".join(rows[:eval_rows]))
        (folder / "train.jsonl").write_text("".join(rows[eval_rows:]))
        names = {kind: [f"{kind}{i}.yaml" for i in range(len(RANKS))] for kind in ("alone", "together")}
        for kind, files in names.items():
            for i, file in enumerate(files):
                text = yaml.safe_dump(config(model, i, batch_size, steps, eval_rows > 0, Path(f"{kind}{i}")))
                (folder / file).write_text(text)
        half = len(RANKS) // 2
        before = sum(train(folder, [file]) for file in names["alone"][:half])
        together = train(folder, names["together"])
        after = sum(train(folder, [file]) for file in names["alone"][half:])
        seconds = {"alone": before + after, "together": together}
        logs = {
            kind: [[json.loads(line) for line in (folder / f"{kind}{i}/log.jsonl").open()] for i in range(len(RANKS))]
            for kind in names
        }
        losses, peaks = (
            {kind: [[line[key] for line in log if key in line] for log in of] for kind, of in logs.items()}
            for key in ("loss", "peak_memory_mb")
        )
        adapters = {
            kind: [load_file(folder / f"{kind}{i}/adapter_model.safetensors") for i in range(len(RANKS))]
            for kind in names
        }
    pairs = zip(adapters["alone"], adapters["together"], strict=True)
    return {
        "seconds": seconds,
        "peak_mb": {kind: max(map(max, of)) for kind, of in peaks.items()},
        "losses_apart": max(
            abs(x - y)
            for a, b in zip(losses["alone"], losses["together"], strict=True)
            for x, y in zip(a, b, strict=True)
        ),
        "adapters_apart": max((a[key] - b[key]).abs().max().item() for a, b in pairs for key in a),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--batches", default="4,16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eval-rows", type=int, default=200)
    options = parser.parse_args()
    model = str(Path(options.smollm2).resolve())
    with tempfile.TemporaryDirectory() as name:
        write_data("sst2", options.sst2, options.e2e, Path(name))
        rows = (Path(name) / "sst2.jsonl").read_text().splitlines(keepends=True)[: 2000 + options.eval_rows]
    for batch_size in map(int, options.batches.split(",")):
        rounds = [round_of(model, rows, batch_size, options.steps, options.eval_rows) for _ in range(options.rounds)]
        ratios = [r["seconds"]["together"] / r["seconds"]["alone"] for r in rounds]
        result = {
            "batch_size": batch_size,
            "eval_rows": options.eval_rows,
            "ratio": round(statistics.median(ratios), 3),
        }
        result |= {"range": [round(min(ratios), 3), round(max(ratios), 3)]}
        result |= {"seconds": [{k: round(v, 1) for k, v in r["seconds"].items()} for r in rounds]}
        result |= {"peak_mb": rounds[-1]["peak_mb"], "machine": machine()["processor"]}
        result |= {key: max(r[key] for r in rounds) for key in ("losses_apart", "adapters_apart")}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
