"""The machine and this process: cores, memory and their limits. GPUs are in lora_ft.model.device."""

import ctypes
import os
import platform
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

CGROUPS = Path("/sys/fs/cgroup")


class Free(NamedTuple):
    """Memory that this process can still allocate. size: bytes; where: the tightest limit, in words."""

    size: int
    where: str


def cores() -> int:
    """CPU cores this process may use: its affinity, and the quota of its container rounded to cores."""
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # not on macOS
    limits = [allowed]
    for group in _control_groups("cpu"):
        version_1 = (_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))
        quota, period = map(_number, _read(group / "cpu.max").split() or version_1)  # in microseconds
        if quota > 0 and period > 0:
            limits.append(round(quota / period))
    return max(1, min(limits))


def cpu_name() -> str:
    """The processor's model, as far as the system names it without a process to ask (a fork of threads that tokenize)."""
    named = os.environ.get("PROCESSOR_IDENTIFIER") or platform.machine()  # the first on Windows
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), named)


def free_memory() -> Free:
    """What this process can still allocate: the machine's free memory, or less by ulimit -v or its container's limit."""
    found = [Free(psutil.virtual_memory().available, "free on this machine")]
    limits = [(limit, used, "the container's limit") for limit, used in _memory_limits()]
    if hasattr(psutil, "RLIMIT_AS"):  # not on Windows and macOS
        process = psutil.Process()
        if (limit := process.rlimit(psutil.RLIMIT_AS)[0]) != psutil.RLIM_INFINITY:
            limits.append((limit, process.memory_info().vms, "this process's limit (ulimit -v)"))
    found += [Free(max(0, limit - used), f"left of {of} of {limit / 2**20:,.0f} MiB") for limit, used, of in limits]
    return min(found)


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The most bytes of this process that were in memory at once."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory(largest: int = 2**30) -> None:
    """Let glibc keep freed blocks up to `largest` bytes for the next step instead of returning them to the kernel.

    Each step frees and allocates the same gigabyte again; getting it from the kernel costs 0.9 us per 4 KiB. But what is kept
    has holes, which grow with the blocks: gigabytes, where layers dequantize their weights in every step.
    """
    mmap_threshold, trim_threshold = -3, -1  # glibc's malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, largest)
        libc.mallopt(trim_threshold, 2**31 - 1)


def release_mapped(paths: Collection[str]) -> None:
    """Take the pages of memory-mapped files out of this process's memory; they stay in the system's cache. Linux only.

    They are read again where they are needed. Without this, a pass over a large file counts as memory in use.
    """
    dont_need = 4  # MADV_DONTNEED: of pages that a file holds unchanged it loses nothing
    for line in _read(Path("/proc/self/maps")).splitlines():
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0] in paths and rights.startswith("r-"):  # not writable
            start, end = (int(address, 16) for address in span.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each control group above this process; used: without the file cache it can drop."""
    files = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # v2, v1
    for group in _control_groups("memory"):
        for limit_file, used_file in files:
            limit, used = _number(_read(group / limit_file)), _number(_read(group / used_file))
            if 0 < limit < psutil.virtual_memory().total:
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                yield limit, used - max(0, _number(stat.get("total_inactive_file") or stat.get("inactive_file") or ""))


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of the groups around it: version 2, and version 1's `controller`.

    Inside a container its own group is the root, whatever path /proc names.
    """
    for root in (CGROUPS, CGROUPS / controller):
        yield root
        for line in _read(Path("/proc/self/cgroup")).splitlines():
            _, controllers, path = line.split(":", 2)
            if (root == CGROUPS and not controllers) or (root != CGROUPS and controller in controllers.split(",")):
                own = root / path.lstrip("/")
                yield from (folder for folder in (own, *own.parents) if root in folder.parents)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(text: str) -> int:
    """The number in a control group's file; -1 for `max` or nothing, which is no limit."""
    return int(text) if text.strip().isdecimal() else -1
