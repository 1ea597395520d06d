"""Cores and memory: the tightest of the machine's, the process's and the container's limits."""

import mmap
import os
import sys
from types import SimpleNamespace

import psutil
import pytest

from lora_ft.core import machine
from tests.helpers.tiny import python


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups as files, those of this process in a folder of their own below the root."""
    real = machine._read
    own = "7:cpu,memory:/job/step\n0::/job/step\n"
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_read", lambda path: own if str(path) == "/proc/self/cgroup" else real(path))
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1, 2, 3], raising=False)

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    "quota, cores", [("100000 100000\n", 1), ("20000 100000\n", 1), ("250000 100000\n", 2), ("800000 100000\n", 4)]
)
@pytest.mark.parametrize("folder", ["", "job/", "job/step/"])
def test_a_quota_of_this_group_or_one_around_it_limits_the_cores(groups, quota, cores, folder):
    groups(**{f"{folder}cpu.max": quota})
    assert machine.cores() == cores


def test_a_quota_in_version_1(groups):
    groups(**{"cpu/job/cpu.cfs_quota_us": "200000\n", "cpu/job/cpu.cfs_period_us": "100000\n"})
    assert machine.cores() == 2


def test_without_a_quota_the_affinity_counts(groups):
    assert machine.cores() == 4
    groups(**{"cpu.max": "max 100000\n", "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})
    assert machine.cores() == 4


def test_a_containers_limit_counts_without_the_files_it_caches(groups):
    groups(
        **{"job/memory.max": f"{2**25}\n", "job/memory.current": f"{2**24}\n", "job/memory.stat": "inactive_file 5\n"}
    )
    assert machine.free_memory() == (2**25 - 2**24 + 5, "left of the container's limit of 32 MiB")


def test_a_containers_limit_in_version_1(groups):
    groups(**{"memory/memory.limit_in_bytes": f"{2**25}\n", "memory/memory.usage_in_bytes": f"{2**24}\n"})
    assert machine.free_memory().size == 2**24


def test_without_limits_the_machines_memory_is_free(groups, monkeypatch):
    monkeypatch.delattr(psutil, "RLIMIT_AS", raising=False)  # without ulimit -v
    groups(**{"memory.max": "max\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert machine.free_memory().where == "free on this machine"
    assert 0 < machine.free_memory().size <= psutil.virtual_memory().total
    assert 0 < 0.9 * machine.resident_memory() <= machine.peak_memory()  # the kernel counts the first in coarser steps


@pytest.mark.parametrize("system, bytes_", [("linux", 2**20), ("darwin", 2**10)])
def test_the_unit_of_the_peak_is_that_of_the_system(monkeypatch, system, bytes_):
    resource = pytest.importorskip("resource", reason="Windows counts the peak in another way")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2**10))
    monkeypatch.setattr(sys, "platform", system)
    assert machine.peak_memory() == bytes_


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit of a process's memory (ulimit -v)")
def test_ulimit_counts_what_the_process_has(groups):
    program = (
        "import resource, sys\n"
        "from lora_ft.core.machine import free_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
        "free = free_memory()\n"
        "assert 0 < free.size < 2**29 and free.where.endswith('(ulimit -v) of 512 MiB'), free\n"
    )
    python(program)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where Linux tells which files are mapped")
def test_a_mapped_file_is_given_back_and_stays_as_it_is(tmp_path):
    path, content = tmp_path / "a", os.urandom(2**20) * 64
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == content
        before = machine.resident_memory()
        machine.release_mapped([str(path)])
        assert before - machine.resident_memory() > 2**25
        assert mapped[:] == content
    machine.release_mapped([])
