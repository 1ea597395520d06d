"""What is set for a device."""

import torch

from lora_ft.model.device import use_no_more_threads_than_cores


def threads_with(quota: str | None, tmp_path, monkeypatch, before: int = 2) -> int:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        use_no_more_threads_than_cores(file)
        return torch.get_num_threads()
    finally:
        torch.set_num_threads(usual)


def test_a_containers_cpu_quota_bounds_the_threads(tmp_path, monkeypatch):
    assert threads_with("100000 100000\n", tmp_path, monkeypatch) == 1
    assert threads_with("20000 100000\n", tmp_path, monkeypatch) == 1  # a fifth of a core
    assert threads_with("800000 100000\n", tmp_path, monkeypatch) == 2  # no more than torch would take
    assert threads_with("max 100000\n", tmp_path, monkeypatch) == 2
    assert threads_with(None, tmp_path, monkeypatch) == 2
