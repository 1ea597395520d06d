"""One run on 1, 2 and 3 processes: equality of losses and adapter, speed, and time spent waiting.

    python benchmarks/processes.py CONFIG [--set KEY=VALUE ...] [--processes 1,2,3] [--threads 1] [--total-threads 2]

Each line is a run with `--threads` threads per process; a last one has a single process with `--total-threads`. The first
five steps do not count. Prints tokens/s, the largest difference of a logged loss and of the adapter from the first run's, the
share of time that the processes spend in the all-reduce of the gradients (mostly waiting for each other), and the bytes sent
per step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_UP = 5


def run_rank(arguments: list[str], path: str) -> None:
    """Run `lora-ft ARGUMENTS` as one rank; record the start, end and bytes of each step's all-reduce in `path`.RANK."""
    import time

    import torch.distributed as dist

    from lora_ft import cli
    from lora_ft.distributed import processes
    from lora_ft.training import step

    all_reduce_gradients, all_reduce, steps, sent = processes.all_reduce_gradients, dist.all_reduce, [], [0]

    def count_bytes(tensor, *rest):
        sent[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *rest)

    def record_time(parameters, loss):
        sent[0], started = 0, time.perf_counter()
        all_reduce_gradients(parameters, loss)
        steps.append((started, time.perf_counter(), sent[0]))
        Path(f"{path}.{processes.rank()}").write_text(json.dumps(steps))

    dist.all_reduce, step.processes.all_reduce_gradients = count_bytes, record_time
    sys.argv = ["lora-ft", *arguments]
    cli.main()


def run(arguments: list[str], processes: int, threads: int, output: Path) -> dict:
    """Train; returns tokens/s, the logged losses, the share of time spent waiting, and the bytes sent per step."""
    waits = output / "waits.json"
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), __file__]
    command += ["--rank", str(waits), "train", *arguments, "--set", f"output={output / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = [json.loads(line) for line in (output / "run/log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    shares, bytes_sent = [], 0
    for rank in range(processes if processes > 1 else 0):
        steps = json.loads(Path(f"{waits}.{rank}").read_text())[WARM_UP:]
        shares.append(sum(end - start for start, end, _ in steps[1:]) / (steps[-1][1] - steps[0][1]))
        bytes_sent = steps[-1][2]
    return {
        "tokens_per_second": statistics.mean(line["tokens_per_second"] for line in lines[WARM_UP:]),
        "losses": [line["loss"] for line in lines],
        "waiting": max(shares, default=0.0),
        "bytes": bytes_sent,
        "adapter": output / "run/adapter_model.safetensors",
    }


def main() -> None:
    """Run with each number of processes and print a line for each."""
    if "--rank" in sys.argv:  # this process is one of those that `run` starts
        i = sys.argv.index("--rank")
        return run_rank(sys.argv[i + 2 :], sys.argv[i + 1])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--processes", default="1,2,3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--total-threads", type=int, default=2)
    options = parser.parse_args()
    from safetensors.numpy import load_file

    arguments = [options.config]
    for setting in [*options.set, "train.logging_steps=1", "train.save_steps=1000000", "data.eval=null"]:
        arguments += ["--set", setting]
    rows = [(int(n), options.threads) for n in options.processes.split(",")] + [(1, options.total_threads)]
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for processes, threads in rows:
            result = run(arguments, processes, threads, Path(folder) / f"{processes}-{threads}")
            first = first or result
            losses = max(abs(a - b) for a, b in zip(result["losses"], first["losses"], strict=True))
            tensors, reference = load_file(result["adapter"]), load_file(first["adapter"])
            adapter = max(float(abs(tensors[name] - reference[name]).max()) for name in tensors)
            print(
                f"{processes} x {threads} threads: {result['tokens_per_second']:6.0f} tokens/s, "
                f"losses within {losses:.1e}, adapter within {adapter:.1e}, waiting {result['waiting']:.1%}, "
                f"{result['bytes']:,} bytes per step",
                flush=True,
            )


if __name__ == "__main__":
    main()
