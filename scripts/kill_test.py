"""Kill and resume a run N times and compare it with an uninterrupted one: `make kill-test N=200`.

A tiny run with dropout, evaluations and checkpoints first runs undisturbed, and its operations below the output folder are
recorded: writes, fsyncs, renames, removals. Then runs of the same config are killed with SIGKILL, alternating between the next
of these operations (a write is cut in half) and a random moment, and resumed with --resume, until N kills are done and the last
run has finished. The final adapter, the last checkpoint's state, the log (without times), the record's metrics and the names of
all files must equal those of the undisturbed run. Runs are forked from a process that has imported everything, so that a kill
takes about a second.
"""

import argparse
import builtins
import gc
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TIMES = {"seconds", "tokens_per_second", "peak_memory_mb"}
SETTINGS = ["adapter.dropout=0.1", "train.micro_batch_tokens=64", "train.save_steps=3", "train.eval_steps=4"]
STARTS_OVER = "starting at step 0"  # in the message of a run that has no checkpoint to resume from
OPERATIONS, STDERR = "operations.txt", "stderr.txt"

# "after step-3: write log.jsonl #2": the last checkpoint, the operation, the path below out/, and its number since then.
Operation = str


class Watch:
    """Intercepts this process's operations below out/: records them, or kills the process at one of them."""

    def __init__(self, out: Path, target: Operation | None, record: Path | None):
        self.out, self.target, self.record = str(out), target, record
        self.counts: Counter[str] = Counter()
        complete = [int(p.parent.name[5:]) for p in out.glob("checkpoints/step-*/lora_ft.json")]
        self.since = f"step-{max(complete, default=0)}"

    def reached(self, what: str, path: object) -> bool:
        """Whether this operation is the target."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        full = os.path.abspath(os.fspath(path))  # type: ignore[call-overload]
        if full != self.out and not full.startswith(self.out + "/"):
            return False
        name = re.sub(r"(tmp|partial)-\d+", r"\1-PID", os.path.relpath(full, self.out))
        if what == "mkdir" and (staged := re.fullmatch(r"checkpoints/\.(step-\d+)\.partial-PID", name)):
            self.since, self.counts = staged[1], Counter()
        self.counts[f"{what} {name}"] += 1
        operation = f"after {self.since}: {what} {name} #{self.counts[f'{what} {name}']}"
        if self.record:
            with self.open(self.record, "a") as f:
                f.write(operation + "\n")
        return operation == self.target

    def install(self) -> None:
        """Replace the functions of os, io, pathlib and safetensors that write."""
        self.open = io.open

        def kill_at(what: str, function: Callable) -> Callable:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                if kwargs.get("dir_fd") is None and self.reached(what, path):
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(path, *args, **kwargs)

            return call

        for what in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate"):
            setattr(os, what, kill_at(what, getattr(os, what)))

        def open_or_kill(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and self.reached("open", path):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.open(path, mode, *args, **kwargs)

        io.open = builtins.open = open_or_kill  # type: ignore[assignment]

        def write_half_at(function: Callable) -> Callable:
            def call(target: Any, data: bytes) -> Any:
                if self.reached("write", target):
                    function(target, data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(target, data)

            return call

        os.write = write_half_at(os.write)
        Path.write_bytes = write_half_at(Path.write_bytes)  # type: ignore[method-assign]

        import safetensors.torch

        save_file = safetensors.torch.save_file  # writes from Rust, past the functions above

        def save_half_at(tensors: dict, path: Path, *args: Any, **kwargs: Any) -> None:
            kill = self.reached("write", path)
            save_file(tensors, path, *args, **kwargs)
            if kill:
                with self.open(path, "r+b") as f:
                    f.truncate(path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save_file = save_half_at  # type: ignore[assignment]


def fork_run(folder: Path, target: Operation | None = None, record: bool = False) -> int:
    """Fork a run with --resume that kills itself at `target`, or records its operations; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        stderr = os.open(STDERR, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stderr, 1)
        os.dup2(stderr, 2)
        if target or record:
            Watch(folder / "out", target, folder / OPERATIONS if record else None).install()
        from lora_ft.commands.train import train
        from lora_ft.config.load import load_config

        train(load_config("config.yaml", SETTINGS), resume=True)
        code = 0
    except BaseException as e:  # noqa: BLE001 (the parent reports any error)
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def result_of(folder: Path) -> dict[str, object]:
    """What must be equal: hashes of the adapter and of the last state, the log without times, metrics, file names."""
    from lora_ft.core import storage

    out = folder / "out"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = max((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    record = json.loads((out / "lora_ft.json").read_text())
    return {
        "adapter": storage.sha256(out / "adapter_model.safetensors"),
        "state": (last.name, storage.sha256(last / "state.safetensors")),
        "log": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
        "metrics": (record["step"], record["steps"], record["metrics"], record["base_metrics"]),
        "files": sorted(str(p.relative_to(out)) for p in out.rglob("*")),
    }


def kinds_first(operations: list[Operation]) -> list[Operation]:
    """The first operation of each kind, then the others, both in the order of the run."""
    first = set({kind(operation): operation for operation in reversed(operations)}.values())
    return [o for o in operations if o in first] + [o for o in operations if o not in first]


def kind(operation: Operation) -> str:
    """The operation without its step and number."""
    return re.sub(r"step-\d+", "step-N", operation.rpartition(" #")[0])


def main() -> None:
    """Run once undisturbed, then kill and resume as the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="number of kills")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random moments, and of the operations that few kills sample"
    )
    options = parser.parse_args()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's default lock is shared by forks, and a killed one may hold it
    import lora_ft.commands.train  # noqa: F401 (imported once, before the forks)
    from tests.helpers.tiny import write_run

    gc.freeze()  # what is imported stays: else each fork's gc.collect() would look through it and so copy it

    with tempfile.TemporaryDirectory() as parent:
        base = write_run(Path(parent).resolve() / "base", "gpt2")
        for record in (True, False):
            shutil.rmtree(base / "out", ignore_errors=True)
            started = time.monotonic()
            if os.waitpid(fork_run(base, record=record), 0)[1]:
                sys.exit((base / STDERR).read_text())
        seconds, expected = time.monotonic() - started, result_of(base)
        shutil.rmtree(base / "out")
        operations = (base / OPERATIONS).read_text().splitlines()
        print(f"undisturbed run: {seconds:.1f} s, {len(operations)} operations below its output", flush=True)
        kill_and_resume(base, expected, kinds_first(operations), seconds, options.n, random.Random(options.seed))


def kill_and_resume(
    base: Path, expected: dict, targets: list[Operation], seconds: float, n: int, draw: random.Random
) -> None:
    """Kill and resume runs until `n` kills are done; exit with 1 at the first difference.

    Args:
        base: the folder with the config, copied for each run.
        expected: the undisturbed run's result.
        targets: the operations to kill at.
        seconds: the undisturbed run's duration.
        draw: the source of the random moments.
    """
    remaining, started = list(targets), time.monotonic()
    done: list[Operation] = []
    kills, at_random, runs, starts = 0, 0, 0, 0
    while kills < n:
        folder, finished = Path(shutil.copytree(base, base.parent / f"run-{runs}")), False
        queue = [o for o in remaining if kind(o) not in set(map(kind, done))] or remaining or list(targets)
        if n < len(queue):
            queue = sorted(draw.sample(queue, n), key=queue.index)  # few kills: sample the whole run
        while not finished:
            target = queue.pop(0) if queue and kills < n and kills % 3 < 2 else None
            had_checkpoint = any((folder / "out/checkpoints").glob("step-*/lora_ft.json"))
            run_started = time.monotonic()
            pid = fork_run(folder, target)
            if target is None and kills < n:
                # `seconds` is the fastest run's duration: on a busy machine most kills would come too late otherwise
                time.sleep(draw.uniform(0.0, seconds))
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            stderr = (folder / STDERR).read_text()
            starts += STARTS_OVER in stderr
            if had_checkpoint and STARTS_OVER in stderr:
                sys.exit(f"FAILED: kill {kills}: started over although there were checkpoints:\n{stderr}")
            if os.WIFSIGNALED(status):
                kills += 1
                if target:
                    done.append(target)
                    remaining = [o for o in remaining if o != target]
                else:
                    at_random += 1
            elif status:
                sys.exit(f"FAILED: after kill {kills} the run did not resume:\n{stderr}")
            else:
                finished = True
                if not had_checkpoint:
                    seconds = min(seconds, time.monotonic() - run_started)
        runs += 1
        result = result_of(folder)
        if result != expected:
            different = "\n".join(
                f"{k}: {result[k]}\n  not {expected[k]}" for k in expected if result[k] != expected[k]
            )
            kept = shutil.copytree(folder, Path(tempfile.mkdtemp()) / "run")
            sys.exit(f"FAILED: after {kills} kills the run differs from the undisturbed one; see {kept}\n{different}")
        shutil.rmtree(folder)
        print(f"{kills} kills, {runs} runs with identical results, {time.monotonic() - started:.0f} s", flush=True)
    kinds = f"{len(set(map(kind, done)))} of {len(set(map(kind, targets)))}"
    print(
        f"{len(done)} kills at an operation ({len(set(done))} of {len(targets)} operations, "
        f"{kinds} kinds), {at_random} at random moments, {starts} starts at step 0, none after a checkpoint"
    )
    print(f"passed: {kills} kills, {runs} runs, each with the same adapter, state, log, metrics and files")


if __name__ == "__main__":
    main()
