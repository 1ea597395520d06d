"""Several processes that train as one: who writes and talks, what they tell each other.

A launcher (lora_ft.distributed.launch, torchrun, accelerate) starts them and says in the environment how many there are; accelerate joins
them. Alone, everything here is a plain call. When one of them ends, whatever the others wait for fails: they then stop as if by
SIGTERM, so that the first process saves what is done.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.nn import Parameter

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import info
from lora_ft.core.signals import Stopped

T = TypeVar("T")
BUCKET = 2**23  # numbers that one all-reduce sums: an adapter's gradient is one bucket, a whole model's many
OWN_FAULT = 3  # seconds after which a failing process that still lives is the only one with its fault
# How those launchers count processes that don't introduce them to each other (SLURM's count of a step, not of the job).
COUNTED_BY = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and talks."""
    return rank() == 0


def init_process_group(device: str, timeout_seconds: float, backend: str | None = None) -> None:
    """Meet the other processes, on "cpu" or "cuda" (each then has a GPU of its own, the current one).

    Raises:
        ConfigError: they were started in a way in which each would train alone.
    """
    for name in COUNTED_BY:
        if int(os.environ.get(name) or 1) > max(1, world_size()):
            raise ConfigError(
                f"this is one of {os.environ[name]} processes that don't know of each other ({name}): each would train "
                "alone. Start one, `lora-ft train CONFIG --processes N`, or let torchrun start them."
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
            f"WORLD_SIZE is {world_size()} but LOCAL_RANK is not set. Start with `lora-ft train CONFIG --processes N` or torchrun."
        )
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and on_node > torch.cuda.device_count():
        raise ConfigError(
            f"{on_node} processes on a machine with {torch.cuda.device_count()} visible GPUs: start one a GPU, or train on "
            "the CPU: --set trainer.use_cpu=true"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else accelerate counts again, and warns
    settings = {"backend": backend} if backend else {}
    state = PartialState(cpu=device == "cpu", timeout=timedelta(seconds=timeout_seconds), **settings)
    if state.num_processes != world_size():
        raise ConfigError(
            f"{world_size()} processes were started but {state.num_processes} met: each would train alone."
        )


def destroy_process_group() -> None:
    """Part from the others, at the end of a run that went well."""
    if world_size() > 1:
        PartialState().destroy_process_group()


@contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Inside, what any other process prints is dropped; but for its error, if it has one that the main process hasn't."""
    if is_main():
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            try:
                yield
            except Exception:  # an error of all processes is told by the main one, whose end ends this one
                time.sleep(OWN_FAULT)
                raise
    except Stopped as stop:
        raise SystemExit(stop.exit_code) from None
    except Exception:
        info(f"process {rank()} of {world_size()} (counted from 0) fails:")
        raise


@contextmanager
def local_main_first() -> Iterator[None]:
    """Inside, one process of each machine is done before its others begin: they find its downloads and encoded data."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        _wait()
    yield
    if first:
        _wait()


def broadcast(make: Callable[[], T]) -> T:
    """`make()`, called in the main process alone; its result in every one."""
    if world_size() == 1:
        return make()
    value = [make() if is_main() else None]
    with collective():
        dist.broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]


def all_gather(value: T) -> list[T]:
    """Every process's value, by rank, in every one."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the main process."""
    if world_size() > 1:
        with collective(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over the processes: a bucket of them an all-reduce, and no byte more."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if i + 1 == len(tensors) or sum(t.numel() for t in bucket) + tensors[i + 1].numel() > BUCKET:
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            with collective():
                dist.all_reduce(flat)
            for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.detach().copy_(total.view_as(t))
            bucket = []


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=PartialState().device)
    with collective():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def all_reduce_gradients(parameters: Sequence[Parameter], loss: Tensor) -> None:
    """Sum gradients, and the loss beside them, over the processes; a process without a share of the step adds zeros."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    all_reduce_sum([*(p.grad for p in parameters if p.grad is not None), loss])


def _wait() -> None:
    if world_size() > 1:
        with collective():
            dist.barrier()


@contextmanager
def collective() -> Iterator[None]:
    """What all processes do at once fails when one of them is gone: the others stop, and the launcher says why."""
    try:
        yield
    except RuntimeError as e:
        if world_size() == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        stop = Stopped(signal.SIGTERM)
        stop.args = ("another of the processes ended",)
        raise stop from e
