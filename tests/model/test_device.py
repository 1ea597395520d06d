"""The settings of a device."""

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


def test_a_macs_gpu_is_used_by_one_process(monkeypatch):
    threads = torch.get_num_threads()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (13, 3))
    assert (prepare_device(), prepare_device(use_cpu=True)) == ("mps", "cpu")
    assert [computes(d, "mps") for d in (torch.float32, torch.float16, torch.bfloat16)] == [True, True, False]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare_device() == "cpu"
    torch.set_num_threads(threads)


def test_the_random_states_of_every_generator_return(monkeypatch):
    class Gpu:
        """A generator as `torch.mps` has it."""

        state = torch.tensor([1])
        get_rng_state = staticmethod(lambda: Gpu.state)
        set_rng_state = staticmethod(lambda state: setattr(Gpu, "state", state))

    monkeypatch.setattr(device, "_gpus", lambda: {"mps": Gpu})
    before, drawn = random_states(), torch.rand(3)
    Gpu.state = torch.tensor([2])
    set_random_states(before)
    assert torch.equal(torch.rand(3), drawn) and Gpu.state == 1
    monkeypatch.setattr(device, "_gpus", dict)
    set_random_states(before)  # on a machine without that GPU
    assert torch.equal(torch.rand(3), drawn)
