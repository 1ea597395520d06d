"""Kill a run again and again, at every write of a checkpoint and at random moments, and compare: `make kill-test N=200`.

A tiny run with dropout, evaluations and checkpoints is made once in peace. Then runs of the same config are killed with
SIGKILL, in turn at the k-th fsync, rename, write or unlink (k sweeps over all of a run's) and at a random moment, and resumed
until they end, until N kills have been done. The final adapter, the last checkpoint's state and the log (times aside) must
equal those of the peaceful run, bit for bit. A child is forked from a process that has imported everything, so that a kill
costs a second.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TIMES = {"seconds", "tokens_per_second", "peak_memory_mb"}
SETTINGS = ["adapter.dropout=0.1", "train.micro_batch_tokens=64", "train.save_steps=3", "train.eval_steps=4"]


def child(folder: Path, kill_at: int | None) -> int:
    """Fork a run that goes on where it can, and kills itself at its `kill_at`-th fsync, rename or replace."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        errors = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        if kill_at is not None:
            arm(kill_at)
        from lora_ft.config import load_config
        from lora_ft.train import train

        train(load_config("config.yaml", SETTINGS), resume=True)
        code = 0
    except BaseException as e:  # noqa: BLE001 (the parent must learn of it, whatever it is)
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def arm(kill_at: int) -> None:
    """Count the calls that make a file or folder land; die before the k-th one."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "write", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal: bytes of the adapter and of the last state, lines of the log without times."""
    out = folder / "out"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = max((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    record = json.loads((out / "lora_ft.json").read_text())
    return {
        "adapter": (out / "adapter_model.safetensors").read_bytes(),
        "state": (last.name, (last / "state.safetensors").read_bytes()),
        "log": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
        "metrics": (record["step"], record["steps"], record["metrics"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by forks, and a killed one may have held it
    import lora_ft.train  # noqa: F401 (imported once, before the forks)
    from tests.base import write_run

    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        base = write_run(Path(place) / "base", "gpt2")
        begun = time.monotonic()
        if os.waitpid(child(base, None), 0)[1]:
            sys.exit((base / "stderr.txt").read_text())
        peaceful, seconds = outcome(base), time.monotonic() - begun
        shutil.rmtree(base / "out")
        kills, runs, k = 0, 0, 0
        while kills < options.n:
            folder = Path(shutil.copytree(base, Path(place) / f"run-{runs}"))
            ended = False
            while not ended:
                by_call = kills < options.n and kills % 2 == 0
                k += by_call
                had = any((folder / "out/checkpoints").glob("step-*/lora_ft.json"))
                pid = child(folder, k if by_call else None)
                if not by_call and kills < options.n:
                    time.sleep(draw.uniform(0.0, seconds))
                    os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
                told = folder / "stderr.txt"
                said = told.read_text() if told.exists() else ""
                told.unlink(missing_ok=True)
                if had and "beginning at step 0" in said:
                    sys.exit(f"kill {kills}: began anew though there were checkpoints:\n{said}")
                if os.WIFSIGNALED(status):
                    kills += 1
                elif status:
                    sys.exit(f"after kill {kills} the run could not go on:\n{said}")
                else:
                    ended, k = True, 0 if by_call else k  # past the last call: sweep from the first again
            runs += 1
            if outcome(folder) != peaceful:
                different = [name for name, value in outcome(folder).items() if value != peaceful[name]]
                kept = shutil.copytree(folder, Path(tempfile.mkdtemp()) / "run")
                sys.exit(f"after {kills} kills: {', '.join(different)} differ from the peaceful run's; look at {kept}")
            shutil.rmtree(folder)
            print(f"{kills} kills, {runs} runs ended in the same bits", flush=True)
    print(f"passed: {kills} kills, {runs} runs, each ended in the same adapter, state and log as the run left in peace")


if __name__ == "__main__":
    main()
