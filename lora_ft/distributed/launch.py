"""Starting a run's processes on this machine with torch's elastic launcher, the one beneath torchrun and accelerate."""

import logging
import os
import signal
import sys

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lora_ft.cli.exits import BUG
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import info

LAUNCHED = ("LOCAL_RANK", "WORLD_SIZE")  # a launcher's mark on the processes it starts


def wanted(processes: int | None, on_gpus: bool) -> int:
    """How many processes to start: as asked for, else one for each visible GPU; 1 where a launcher has started this one.

    Raises:
        ConfigError: a launcher has started another number than asked for.
    """
    if any(name in os.environ for name in LAUNCHED):
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if processes not in (None, started):
            raise ConfigError(f"--processes {processes}: a launcher has started {started}. Leave --processes out.")
        return 1
    return processes or max(1, torch.cuda.device_count() if on_gpus else 1)


def launch(processes: int, words: list[str]) -> int:
    """Run `lora-ft WORDS` in so many processes that know of each other; the exit code of the whole.

    A signal to this process goes on to all of them, and so does the end of one that fails.
    """
    logging.disable(logging.CRITICAL)  # the elastic agent's: what happened is told by the processes and below
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of multiprocessing's own tracker, when a process was killed
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id="lora-ft",
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(settings, _process)(words)
    except SignalException as e:
        return 128 + e.sigval
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        info(f"process {rank} of {processes} (counted from 0) was ended by {name}{memory}; the others have stopped")
        return BUG
    return 0


def _process(words: list[str]) -> None:
    """One of the processes; in a group of its own, so that Ctrl-C comes from the launcher only, not from the terminal too."""
    os.setpgrp()
    sys.argv = ["lora-ft", *words]
    from lora_ft.cli import main

    main()
