"""The settings of a device."""

import pytest
import torch

from lora_ft.core import machine
from lora_ft.model.device import limit_threads


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
