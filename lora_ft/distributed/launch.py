"""Starting the processes of a run on this machine with torch's elastic launcher, which torchrun and accelerate use too."""

import logging
import os
import signal
import sys
from collections.abc import Callable

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lora_ft.core import machine
from lora_ft.core.disk import WINDOWS
from lora_ft.core.errors import EXIT_BUG, ConfigError
from lora_ft.core.messages import info
from lora_ft.core.ranks import world_size
from lora_ft.core.terminal import doing

LAUNCHER_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE")  # a launcher sets them for the processes it starts


def processes_to_start(requested: int | None, on_gpus: bool) -> int:
    """The number of processes: as requested, else one per visible GPU; 1 if a launcher has started this process.

    Raises:
        ConfigError: a launcher has started another number than requested.
    """
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        started = world_size()
        if requested not in (None, started):
            raise ConfigError(f"--processes {requested}: a launcher has started {started}. Leave --processes out.")
        return 1
    return requested or max(1, torch.cuda.device_count() if on_gpus else 1)


def launch(processes: int, arguments: list[str], entry_point: Callable[[], None]) -> int:
    """Run `lora-ft ARGUMENTS` in several processes that find each other; returns their exit code.

    A signal to this process is forwarded to all of them. When one fails, the others are stopped. entry_point: a
    module-level function (it is pickled) that runs the command line in sys.argv.
    """
    logging.disable(logging.CRITICAL)  # the elastic agent's; the processes and the code below report what happened
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // processes)))
    if WINDOWS:
        os.environ.setdefault("USE_LIBUV", "0")  # torch's builds for Windows may lack it, but ask for it
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # multiprocessing's resource tracker, after a kill
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
        with doing(None):  # rank 0 has the terminal
            elastic_launch(settings, _run)(entry_point, arguments)
    except SignalException as e:
        return 128 + e.sigval
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        memory = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
        info(f"process {rank} of {processes} (counted from 0) was ended by {name}{memory}; the others have stopped")
        return EXIT_BUG
    return 0


def _run(entry_point: Callable[[], None], arguments: list[str]) -> None:
    """One of the processes. It leaves the terminal's process group, so that only the launcher forwards Ctrl-C."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    sys.argv = ["lora-ft", *arguments]
    entry_point()
