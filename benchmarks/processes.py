"""One run on 1, 2 and 3 processes: the same losses and adapter, how fast, how long they wait for each other.

    python benchmarks/processes.py CONFIG [--set KEY=VALUE ...] [--processes 1,2,3] [--threads 1] [--total-threads 2]

Each row is a run of its own with `--threads` threads a process, steps after the first five counted; one more row is a single
process with `--total-threads`. Prints a table of tokens/s, the largest difference of a logged loss and of the adapter from the
first row's, the share of the time that the processes spend in the sum of gradients (waiting for each other, mostly), and the
bytes that a step sends.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM = 5


def one_process(words: list[str], waits: str) -> None:
    """`lora-ft WORDS` in this process, which notes how long each step waited and what it sent."""
    import time

    import torch.distributed as dist

    from lora_ft import cli
    from lora_ft.distributed import processes
    from lora_ft.training import step

    add_up, all_reduce, notes, sent = processes.all_reduce_gradients, dist.all_reduce, [], [0]

    def counted(tensor, *rest):
        sent[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *rest)

    def timed(parameters, loss):
        sent[0], begun = 0, time.perf_counter()
        add_up(parameters, loss)
        now = time.perf_counter()
        notes.append((begun, now, sent[0]))
        Path(f"{waits}.{processes.rank()}").write_text(json.dumps(notes))

    dist.all_reduce, step.processes.add_up_gradients = counted, timed
    sys.argv = ["lora-ft", *words]
    cli.main()


def run(words: list[str], processes: int, threads: int, output: Path) -> dict:
    """Train; tokens/s, the logged losses, the share of waiting and the bytes of a step."""
    waits = output / "waits.json"
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), __file__]
    command += ["--as-process", str(waits), "train", *words, "--set", f"output={output / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = [json.loads(line) for line in (output / "run/log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    shares, bytes_sent = [], 0
    for rank in range(processes if processes > 1 else 0):
        notes = json.loads(Path(f"{waits}.{rank}").read_text())[WARM:]
        shares.append(sum(end - begun for begun, end, _ in notes[1:]) / (notes[-1][1] - notes[0][1]))
        bytes_sent = notes[-1][2]
    return {
        "tokens_per_second": statistics.mean(line["tokens_per_second"] for line in lines[WARM:]),
        "losses": [line["loss"] for line in lines],
        "waiting": max(shares, default=0.0),
        "bytes": bytes_sent,
        "adapter": output / "run/adapter_model.safetensors",
    }


def main() -> None:
    if "--as-process" in sys.argv:
        at = sys.argv.index("--as-process")
        return one_process(sys.argv[at + 2 :], sys.argv[at + 1])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--processes", default="1,2,3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--total-threads", type=int, default=2)
    options = parser.parse_args()
    from safetensors.numpy import load_file

    words = [options.config]
    for setting in [*options.set, "train.logging_steps=1", "train.save_steps=1000000", "data.eval=null"]:
        words += ["--set", setting]
    rows = [(int(n), options.threads) for n in options.processes.split(",")] + [(1, options.total_threads)]
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for processes, threads in rows:
            found = run(words, processes, threads, Path(folder) / f"{processes}-{threads}")
            first = first or found
            losses = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
            mine, theirs = load_file(found["adapter"]), load_file(first["adapter"])
            adapter = max(float(abs(mine[name] - theirs[name]).max()) for name in mine)
            print(
                f"{processes} x {threads} threads: {found['tokens_per_second']:6.0f} tokens/s, "
                f"losses within {losses:.1e}, adapter within {adapter:.1e}, waiting {found['waiting']:.1%}, "
                f"{found['bytes']:,} bytes a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
