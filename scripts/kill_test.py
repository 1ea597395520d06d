"""Kill a run again and again, at every write of its output and at random moments, and compare: `make kill-test N=200`.

A tiny run with dropout, evaluations and checkpoints is made once in peace, and each of its operations below the output folder
is noted: writes, fsyncs, renames, removals. Then runs of the same config are killed with SIGKILL, in turn at the next of these
operations (a write is left half done) and at a random moment, and go on with --resume, again and again, until N kills have
been done and the last run has ended. The final adapter, the last checkpoint's state, the log (times aside), the record's
metrics and the names of all files must equal those of the peaceful run. A child is forked from a process that has imported
everything, so that a kill costs about a second.
"""

import argparse
import builtins
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
ANEW = "starting at step 0"
NOTED, SAID = "operations.txt", "stderr.txt"

# "after step-3: write log.jsonl #2": since which checkpoint was begun or gone on from, what, below out/, the how manieth.
Operation = str


class Watch:
    """Sees what this process does below out/; notes it, or dies at one operation."""

    def __init__(self, out: Path, target: Operation | None, note: Path | None):
        self.out, self.target, self.note = str(out), target, note
        self.seen: Counter[str] = Counter()
        whole = [int(p.parent.name[5:]) for p in out.glob("checkpoints/step-*/lora_ft.json")]
        self.since = f"step-{max(whole, default=0)}"

    def reached(self, what: str, path: object) -> bool:
        """Whether this operation is the one to die at."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        full = os.path.abspath(os.fspath(path))  # type: ignore[call-overload]
        if full != self.out and not full.startswith(self.out + "/"):
            return False
        name = re.sub(r"(tmp|partial)-\d+", r"\1-PID", os.path.relpath(full, self.out))
        if what == "mkdir" and (staged := re.fullmatch(r"checkpoints/\.(step-\d+)\.partial-PID", name)):
            self.since, self.seen = staged[1], Counter()
        self.seen[f"{what} {name}"] += 1
        operation = f"after {self.since}: {what} {name} #{self.seen[f'{what} {name}']}"
        if self.note:
            with self.open(self.note, "a") as f:
                f.write(operation + "\n")
        return operation == self.target

    def install(self) -> None:
        self.open = io.open

        def by_path(what: str, function: Callable) -> Callable:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                if kwargs.get("dir_fd") is None and self.reached(what, path):
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(path, *args, **kwargs)

            return call

        for what in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate"):
            setattr(os, what, by_path(what, getattr(os, what)))

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and self.reached("open", path):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.open(path, mode, *args, **kwargs)

        io.open = builtins.open = opened  # type: ignore[assignment]

        def halving(function: Callable) -> Callable:
            def call(place: Any, data: bytes) -> Any:
                if self.reached("write", place):
                    function(place, data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(place, data)

            return call

        os.write = halving(os.write)
        Path.write_bytes = halving(Path.write_bytes)  # type: ignore[method-assign]

        import safetensors.torch

        save_file = safetensors.torch.save_file  # writes from Rust, unseen by the others

        def saved_half(tensors: dict, path: Path, *args: Any, **kwargs: Any) -> None:
            dies = self.reached("write", path)
            save_file(tensors, path, *args, **kwargs)
            if dies:
                with self.open(path, "r+b") as f:
                    f.truncate(path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save_file = saved_half  # type: ignore[assignment]


def child(folder: Path, target: Operation | None = None, note: bool = False) -> int:
    """Fork a run that goes on where it can, and kills itself at `target`, or notes its operations."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        said = os.open(SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if target or note:
            Watch(folder / "out", target, folder / NOTED if note else None).install()
        from lora_ft.commands.train import train
        from lora_ft.config.load import load_config

        train(load_config("config.yaml", SETTINGS), resume=True)
        code = 0
    except BaseException as e:  # noqa: BLE001 (the parent must learn of it, whatever it is)
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal: hashes of the adapter and of the last state, the log without times, metrics, names of files."""
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
    """One of each kind (whatever the step and the time) before the others, each in the run's order."""
    first = set({kind(operation): operation for operation in reversed(operations)}.values())
    return [o for o in operations if o in first] + [o for o in operations if o not in first]


def kind(operation: Operation) -> str:
    return re.sub(r"step-\d+", "step-N", operation.rpartition(" #")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, and of where a short sweep begins")
    options = parser.parse_args()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by forks, and a killed one may have held it
    import lora_ft.commands.train  # noqa: F401 (imported once, before the forks)
    from tests.helpers.tiny import write_run

    with tempfile.TemporaryDirectory() as place:
        base = write_run(Path(place).resolve() / "base", "gpt2")
        for note in (True, False):
            shutil.rmtree(base / "out", ignore_errors=True)
            begun = time.monotonic()
            if os.waitpid(child(base, note=note), 0)[1]:
                sys.exit((base / SAID).read_text())
        seconds, peaceful = time.monotonic() - begun, outcome(base)
        shutil.rmtree(base / "out")
        operations = (base / NOTED).read_text().splitlines()
        print(f"a run left in peace: {seconds:.1f} s, {len(operations)} operations below its output", flush=True)
        passed(base, peaceful, kinds_first(operations), seconds, options.n, random.Random(options.seed))


def passed(base: Path, peaceful: dict, targets: list[Operation], seconds: float, n: int, draw: random.Random) -> None:
    """Kill and resume until `n` kills are done; exit 1 at the first difference."""
    waiting, begun = list(targets), time.monotonic()
    done: list[Operation] = []
    kills, at_random, runs, anew = 0, 0, 0, 0
    while kills < n:
        folder, ended = Path(shutil.copytree(base, base.parent / f"run-{runs}")), False
        turn = [o for o in waiting if kind(o) not in set(map(kind, done))] or waiting or list(targets)
        if n < len(turn):
            turn = sorted(draw.sample(turn, n), key=turn.index)  # a few kills only: from everywhere in the run
        while not ended:
            target = turn.pop(0) if turn and kills < n and kills % 3 < 2 else None
            had = any((folder / "out/checkpoints").glob("step-*/lora_ft.json"))
            child_begun = time.monotonic()
            pid = child(folder, target)
            if target is None and kills < n:
                time.sleep(
                    draw.uniform(0.0, seconds)
                )  # of the fastest run: on a busy machine most moments would be too late
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            said = (folder / SAID).read_text()
            anew += ANEW in said
            if had and ANEW in said:
                sys.exit(f"FAILED: kill {kills}: began anew though there were checkpoints:\n{said}")
            if os.WIFSIGNALED(status):
                kills += 1
                if target:
                    done.append(target)
                    waiting = [o for o in waiting if o != target]
                else:
                    at_random += 1
            elif status:
                sys.exit(f"FAILED: after kill {kills} the run could not go on:\n{said}")
            else:
                ended, seconds = True, min(seconds, time.monotonic() - child_begun if not had else seconds)
        runs += 1
        found = outcome(folder)
        if found != peaceful:
            different = "\n".join(f"{k}: {found[k]}\n  not {peaceful[k]}" for k in peaceful if found[k] != peaceful[k])
            kept = shutil.copytree(folder, Path(tempfile.mkdtemp()) / "run")
            sys.exit(f"FAILED: after {kills} kills the run differs from the peaceful one; look at {kept}\n{different}")
        shutil.rmtree(folder)
        print(f"{kills} kills, {runs} runs ended in the same bits, {time.monotonic() - begun:.0f} s", flush=True)
    kinds = f"{len(set(map(kind, done)))} of {len(set(map(kind, targets)))}"
    print(
        f"{len(done)} kills at an operation ({len(set(done))} of {len(targets)} operations, "
        f"{kinds} kinds), {at_random} at random moments, {anew} beginnings at step 0, "
        "none after a checkpoint"
    )
    print(f"passed: {kills} kills, {runs} runs, each ended in the same adapter, state, log, metrics and files")


if __name__ == "__main__":
    main()
