"""The processes of a run: their ranks, what they exchange, and how one that fails ends the others.

A launcher (lora_ft.distributed.launch, torchrun, accelerate) starts the processes and describes them in the environment;
accelerate connects them. In a run of one process each function here is a plain call. When a process dies, the collective
that the others wait in fails; they then stop as if by SIGTERM, so that rank 0 saves what is done.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.nn import Parameter

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import info
from lora_ft.core.ranks import from_environment, rank, world_size
from lora_ft.core.signals import Stopped

T = TypeVar("T")
BUCKET_SIZE = 2**23  # numbers per all-reduce: an adapter's gradient fits one bucket, a full model's takes many
REPORT_SECONDS = 1  # within which the launcher sees that a process has failed
MAIN_ERROR_SECONDS = 3  # an error of all ranks ends rank 0, and with it the others, within this time
TIMEOUT_SECONDS = 4 * 3600  # default of trainer.ddp_timeout: one process may encode the data while the others wait
# The process counts of launchers that do not connect their processes (SLURM: of the step, not of the job).
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints messages."""
    return rank() == 0


def init_process_group(device: str, timeout_seconds: float | None = None, backend: str | None = None) -> None:
    """Connect to the other processes of this run, if there are any.

    device: "cpu", or "cuda": then each process uses a GPU of its own. timeout_seconds: how long a process waits for the
    others before it fails. backend: of torch.distributed; by default the one for the device.

    Raises:
        ConfigError: the processes were started in a way that would make each train alone.
    """
    for name in OTHER_LAUNCHERS:
        if os.environ.get(name) and from_environment(name, 1) > max(1, world_size()):
            raise ConfigError(
                f"this is one of {os.environ[name]} processes that are not connected ({name}): each would train alone. "
                "Start one, `lora-ft train CONFIG --processes N`, or let torchrun start them."
            )
    if world_size() == 1:
        if {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys() and "RANK" not in os.environ:
            raise ConfigError(
                "accelerate launch was asked for several processes but starts only one on a CPU. Start them with "
                "`lora-ft train CONFIG --processes N`, `accelerate launch --multi_gpu` or torchrun."
            )
        return
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()} but LOCAL_RANK is not set. Start with `lora-ft train CONFIG --processes N` or "
            "torchrun."
        )
    for name in ("LOCAL_RANK", "MASTER_PORT"):  # accelerate and torch read them
        from_environment(name, 0)
    on_node = from_environment("LOCAL_WORLD_SIZE", 1)
    if device == "cuda" and on_node > torch.cuda.device_count():
        raise ConfigError(
            f"{on_node} processes on a machine with {torch.cuda.device_count()} visible GPUs: start one per GPU, or train "
            "on the CPU: --set trainer.use_cpu=true"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else accelerate sets it, with a warning
    settings = {"backend": backend} if backend else {}
    timeout = timedelta(seconds=timeout_seconds or TIMEOUT_SECONDS)
    state = PartialState(cpu=device == "cpu", timeout=timeout, **settings)
    if state.num_processes != world_size():
        raise ConfigError(
            f"{world_size()} processes were started but {state.num_processes} connected: each would train alone."
        )


def destroy_process_group() -> None:
    """Disconnect from the other processes, at the end of a run that succeeded."""
    if world_size() > 1:
        PartialState().destroy_process_group()


@contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Silence every rank but 0; an error that only this rank raises is still printed.

    A rank that stops because another has failed ends after it: the launcher takes the exit code of the first.
    """
    try:
        if is_main():
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            try:
                yield
            except Exception:  # if rank 0 has the same error, it reports it and its exit ends this process
                time.sleep(MAIN_ERROR_SECONDS)
                raise
    except Stopped as stop:
        if isinstance(stop.__cause__, RuntimeError):  # of `collective`
            with suppress(Stopped):  # the launcher's signal, when it has seen it
                time.sleep(REPORT_SECONDS)
        if is_main():
            raise
        raise SystemExit(stop.exit_code) from None
    except Exception:
        if is_main():
            raise
        info(f"process {rank()} of {world_size()} (counted from 0) fails:")
        raise


@contextmanager
def local_main_first() -> Iterator[None]:
    """Let one process per machine run the body before the others, which then find its downloads and encoded data."""
    with collective(), PartialState().local_main_process_first() if world_size() > 1 else nullcontext():
        yield


def broadcast(make: Callable[[], T]) -> T:
    """Call `make()` on rank 0 only; returns its result on every rank."""
    if world_size() == 1:
        return make()
    value = [make() if is_main() else None]
    with collective():
        dist.broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]


def all_gather(value: T) -> list[T]:
    """The values of all processes by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors in place with those of rank 0."""
    if world_size() > 1:
        with collective(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over the processes, with one all-reduce per bucket of tensors."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if i + 1 == len(tensors) or sum(t.numel() for t in bucket) + tensors[i + 1].numel() > BUCKET_SIZE:
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            with collective():
                dist.all_reduce(flat)
            for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.detach().copy_(total.view_as(t))
            bucket = []


def all_reduce_gradients(parameters: Sequence[Parameter], loss: Tensor) -> None:
    """Sum the gradients, and the loss with them, over the processes; a rank without a part of the step adds zeros."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    all_reduce_sum([*(p.grad for p in parameters if p.grad is not None), loss])


@contextmanager
def collective() -> Iterator[None]:
    """Turn the failure of a collective operation into `Stopped`; the launcher reports which process died.

    Raises:
        Stopped: another process is gone.
    """
    try:
        yield
    except RuntimeError as e:
        if world_size() == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        stop = Stopped(signal.SIGTERM)
        stop.args = ("another of the processes ended",)
        raise stop from e
