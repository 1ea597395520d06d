"""Speed and memory against PEFT + Trainer, TRL and the machine's limit: `make bench`.

    python benchmarks/bench.py [--models smollm2,gpt2] [--workloads sst2,...] [--rounds 3] [--steps 8] [--rows ...]

All rows train the same examples from the same initial A, each in its own process. They take turns in each round, so that
changes in the machine's load affect all of them. A row's speed is the median over its steps of real tokens per second (padding
does not count). Ratios compare the n-th steps of two rows within a round: median (minimum to maximum). `--add` keeps the rounds
that results.json already has.

    lora-ft    lora-ft's training loop
    peft       PEFT + Trainer, dynamic padding, the same batches in the same order
    grouped    PEFT + Trainer, length-grouped batches of the same examples
    trl        PEFT + TRL's SFTTrainer, padding-free, with TRL's loss; the same batches
    full       full fine-tuning with lora-ft's training loop: the difference is what LoRA saves
    floor      only the frozen layers' matrix products at the same shapes, and the head's at the supervised positions

A row is void if its losses differ from lora-ft's: by more than 1e-3 in a step on the same batches, by more than 2% in the mean
on other batches (grouped). Results are merged into benchmarks/results.json, from which docs/bench.svg is drawn. On a GPU, the
shapes of Llama 3.2 1B, Llama 3.1 8B and Qwen 2.5 7B run as well.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from plot import draw
from workloads import MODELS, add_sources, make_model, write_data

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
ROWS = ("lora-ft", "peft", "grouped", "trl", "full", "floor")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the data sheets


def main() -> None:
    """Run the rounds, print the ratios, update results.json and the chart."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--models", default=",".join(MODELS if gpu else MODELS[:2]))
    parser.add_argument("--workloads", default="sst2,e2e_qv,e2e_all,text" + (",text1024" if gpu else ""))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--add", action="store_true")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("machine") != machine():
        results = {"machine": machine(), "pieces": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in options.models.split(","):
            make_model(model, options.smollm2, folder)
            for workload in options.workloads.split(","):
                write_data(workload, options.sst2, options.e2e, folder)
                piece = results["pieces"].get(f"{model} {workload}", {}) if options.add else {}
                piece = {"date": str(date.today()), "rows": piece.get("rows", {})}
                results["pieces"][f"{model} {workload}"] = piece
                first = 1 + max((r["round"] for row in piece["rows"].values() for r in row), default=0)
                for turn in range(first, first + options.rounds):
                    for row in options.rows.split(","):
                        result = {"round": turn} | run_row(row, workload, model, folder, options.steps)
                        piece["rows"].setdefault(row, []).append(result)
                        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print("\n".join(report(f"{model} {workload}", piece["rows"])), flush=True)
    draw(results, HERE.parent / "docs" / "bench.svg")


def run_row(row: str, workload: str, model: str, folder: Path, steps: int) -> dict:
    """Run one row of rows.py in its own process; returns its result with the median speed of its steps."""
    command = [sys.executable, str(HERE / "rows.py"), row, workload, model, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{model} {workload} {row}: {done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    result = {k: [round(x, 4) for x in v] if isinstance(v, list) else v for k, v in result.items()}
    result["tokens_per_second"] = round(statistics.median(rates(result)), 1)
    summary = f"{result['tokens_per_second']:7.0f} tokens/s, peak {result.get('peak_mb', 0):.0f} MiB"
    print(f"{model} {workload} {row:8} {summary}", file=sys.stderr, flush=True)
    return result


def rates(result: dict) -> list[float]:
    """Real tokens per second of each step."""
    return [n / s for n, s in zip(result["tokens"], result["seconds"], strict=True)]


def report(piece: str, results: dict[str, list[dict]]) -> list[str]:
    """A line per row of a workload: speed, peak memory, and the ratios to lora-ft's.

    Args:
        piece: the model and the workload.
        results: each row's results, one per round.
    """
    ours, lines = results["lora-ft"], []
    for row, theirs in results.items():
        pairs = [(a, b) for a in ours for b in theirs if a["round"] == b["round"]]
        speed = [x / y for a, b in pairs for x, y in zip(rates(a), rates(b), strict=False)]
        rate = statistics.median(r["tokens_per_second"] for r in theirs)
        line = f"{piece}: {row:8} {rate:6.0f} tokens/s; lora-ft / {row} {spread(speed)}"
        if "peak_mb" in theirs[0]:
            memory = [a["peak_mb"] / b["peak_mb"] for a, b in pairs]
            line += f"; peak {statistics.median(r['peak_mb'] for r in theirs):.0f} MiB, ratio {spread(memory)}"
        if row in ("peft", "grouped", "trl"):
            actual, allowed = difference(row, ours[0]["losses"], theirs[0]["losses"])
            line += f"; losses differ by {actual:.1e}" + (" VOID" if not actual <= allowed else "")
        lines.append(line)
    flops = [sum(r["flops"]) / sum(r["tokens"]) for r in results.get("floor", [])]  # per real token
    peak = next((f for name, f in PEAK_FLOPS.items() if name in machine()["processor"]), None)
    if flops and peak:
        used = [a["tokens_per_second"] * f / peak for a, f in zip(ours, flops, strict=False)]
        lines.append(f"{piece}: model FLOPs utilisation (counting 4P and the adapters, not 6P) {spread(used)}")
    return lines


def difference(row: str, ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """The difference of the losses, and the largest one allowed."""
    if row == "grouped":
        mean = statistics.mean(ours)
        return abs(mean - statistics.mean(theirs)), 0.02 * mean
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=False)), 1e-3


def spread(values: list[float]) -> str:
    """`median (minimum to maximum)`."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def machine() -> dict:
    """The processor, the threads and the versions that results depend on."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
        processor = f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    return {"processor": processor, "threads": torch.get_num_threads(), "versions": {p: version(p) for p in packages}}


if __name__ == "__main__":
    main()
