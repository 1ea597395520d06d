"""The settings of a device."""

import subprocess
import sys

import pytest
import torch

from lora_ft.core import machine
from lora_ft.model import device
from lora_ft.model.device import computes, limit_threads, prepare_device, random_states, set_random_states


@pytest.mark.parametrize("cores, threads", [(1, 1), (2, 2), (8, 2)])
def test_torch_gets_no_more_threads_than_there_are_cores(monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        limit_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


EQUAL_ROWS = """
import torch
from lora_ft.model.device import prepare_device
prepare_device(use_cpu=True)
torch.set_num_threads(2)
torch.manual_seed(0)
x, W = torch.randn(320, 1536), torch.randn(576, 1536)
all_rows = x @ W.T
print([n for n in (8, 64, 100, 160) if not torch.equal(x[:n] @ W.T, all_rows[:n])])
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL, which torch has on x86 processors only")
def test_a_row_of_a_product_does_not_depend_on_how_many_there_are():
    # in a process of its own: MKL reads the setting before its first product
    ended = subprocess.run([sys.executable, "-c", EQUAL_ROWS], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.fixture
def found(monkeypatch):
    """Sets the kind of the accelerator that torch finds."""
    threads = torch.get_num_threads()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield lambda kind: monkeypatch.setattr(device, "accelerator", lambda: kind)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "kind, in_several_processes", [("cuda", "cuda"), ("mps", "cpu"), ("xpu", "cpu"), ("cpu", "cpu")]
)
def test_the_gpu_that_is_there_is_used(found, monkeypatch, kind, in_several_processes):
    found(kind)
    assert (prepare_device(), prepare_device(use_cpu=True)) == (kind, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare_device() == in_several_processes


def test_a_device_that_is_not_supported_is_told(found, capsys):
    found("hpu")
    assert prepare_device() == "cpu"
    assert capsys.readouterr().err == "warning: the device 'hpu' is not supported: the CPU is used.\n"


def test_the_dtypes_of_a_macs_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (13, 3))
    assert [computes(d, "mps") for d in (torch.float32, torch.float16, torch.bfloat16)] == [True, True, False]


def test_the_random_states_of_every_generator_return(found, monkeypatch):
    class Gpu:
        """A generator as `torch.mps` has it."""

        state = torch.tensor([1])
        get_rng_state = staticmethod(lambda: Gpu.state)
        set_rng_state = staticmethod(lambda state: setattr(Gpu, "state", state))

    found("mps")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Gpu)
    before, drawn = random_states(), torch.rand(3)
    Gpu.state = torch.tensor([2])
    set_random_states(before)
    assert torch.equal(torch.rand(3), drawn) and Gpu.state == 1
    found("cpu")
    set_random_states(before)  # on a machine without that GPU
    assert torch.equal(torch.rand(3), drawn)
