"""Speed and memory against PEFT + Trainer, TRL and the machine's floor: `make bench`.

    python benchmarks/bench.py [--models smollm2,gpt2] [--workloads sst2,...] [--rounds 3] [--steps 8] [--rows ...]

Rows train the same examples from the same initial A, each in a process of its own, and take turns round by round, so that
the machine's drift hits all alike. A row's speed is the median over its steps of real tokens a second (padding is none);
ratios are of the n-th step of one to the n-th of the other within a round: median, and least to most. `--add` keeps the rounds
that results.json has of a piece.

    lora-ft    the tool's own path
    peft       PEFT + Trainer, dynamic padding, the same batches in the same order
    grouped    PEFT + Trainer, length-grouped batches of the same examples
    trl        PEFT + TRL's SFTTrainer, padding-free, with its own loss; the same batches
    full       full fine-tuning with lora-ft's engine: what LoRA itself saves
    floor      the frozen layers' products alone at the same shapes, and the head's at the supervised positions

A row whose losses are not lora-ft's is void: each step to 1e-3 on the same batches, the mean to 2% for other batches (grouped).
Results are merged into benchmarks/results.json, from which docs/bench.svg is drawn. On a GPU the 1B Llama shape is run too.
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
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, as their makers say


def main() -> None:
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
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if kept.get("machine") != machine():
        kept = {"machine": machine(), "pieces": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in options.models.split(","):
            make_model(model, options.smollm2, folder)
            for workload in options.workloads.split(","):
                write_data(workload, options.sst2, options.e2e, folder)
                piece = kept["pieces"].get(f"{model} {workload}", {}) if options.add else {}
                piece = {"date": str(date.today()), "rows": piece.get("rows", {})}
                kept["pieces"][f"{model} {workload}"] = piece
                for _ in range(options.rounds):
                    for row in options.rows.split(","):
                        result = run_row(row, workload, model, folder, options.steps)
                        piece["rows"].setdefault(row, []).append(result)
                        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
                print("\n".join(report(f"{model} {workload}", piece["rows"])), flush=True)
    draw(kept, HERE.parent / "docs" / "bench.svg")


def run_row(row: str, workload: str, model: str, folder: Path, steps: int) -> dict:
    """One row in a process of its own, as `rows.py` says; with the median speed of its steps."""
    command = [sys.executable, str(HERE / "rows.py"), row, workload, model, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{model} {workload} {row}: {done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    result = {k: [round(x, 4) for x in v] if isinstance(v, list) else v for k, v in result.items()}
    result["tokens_per_second"] = round(statistics.median(rates(result)), 1)
    shown = f"{result['tokens_per_second']:7.0f} tokens/s, peak {result.get('peak_mb', 0):.0f} MiB"
    print(f"{model} {workload} {row:8} {shown}", file=sys.stderr, flush=True)
    return result


def rates(result: dict) -> list[float]:
    """Real tokens a second of each step."""
    return [n / s for n, s in zip(result["tokens"], result["seconds"], strict=True)]


def report(piece: str, found: dict[str, list[dict]]) -> list[str]:
    ours, lines = found["lora-ft"], []
    for row, theirs in found.items():
        pairs = list(zip(ours, theirs, strict=False))
        speed = [x / y for a, b in pairs for x, y in zip(rates(a), rates(b), strict=False)]
        rate = statistics.median(r["tokens_per_second"] for r in theirs)
        line = f"{piece}: {row:8} {rate:6.0f} tokens/s; lora-ft / {row} {spread(speed)}"
        if "peak_mb" in theirs[0]:
            memory = [a["peak_mb"] / b["peak_mb"] for a, b in pairs]
            line += f"; peak {statistics.median(r['peak_mb'] for r in theirs):.0f} MiB, ratio {spread(memory)}"
        if row in ("peft", "grouped", "trl"):
            apart, allowed = difference(row, ours[0]["losses"], theirs[0]["losses"])
            line += f"; losses differ by {apart:.1e}" + (" VOID" if not apart <= allowed else "")
        lines.append(line)
    flops = [sum(r["flops"]) / sum(r["tokens"]) for r in found.get("floor", [])]  # of a real token
    peak = next((f for name, f in PEAK_FLOPS.items() if name in machine()["processor"]), None)
    if flops and peak:
        used = [a["tokens_per_second"] * f / peak for a, f in zip(ours, flops, strict=False)]
        lines.append(f"{piece}: model FLOPs utilisation (4P and the adapters' own, never 6P) {spread(used)}")
    return lines


def difference(row: str, ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """How far losses are apart, and how far they may be."""
    if row == "grouped":
        mean = statistics.mean(ours)
        return abs(mean - statistics.mean(theirs)), 0.02 * mean
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=False)), 1e-3


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def machine() -> dict:
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
