"""PiSSA's start: the principal part of the base's weight."""

import pytest
import torch
from torch import nn

from lora_ft.nn.adapted import bare
from lora_ft.nn.lora import RowBlocks
from lora_ft.nn.pissa import PiSSALinear, principal


def test_a_and_b_start_as_the_best_approximation_of_each_part():
    base = nn.Linear(12, 18)
    layer = PiSSALinear(base, 3, 2.0, {"q": RowBlocks(2, 9, 0, 3), "v": RowBlocks(2, 9, 6, 3)})
    layer.start()
    x = torch.randn(7, 12)
    torch.testing.assert_close(layer(x), base(x), atol=1e-6, rtol=1e-5)
    for part, rows in layer.rows.items():
        W = rows.of(base.weight.T).flatten(-2).T
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        best = U[:, :3] * S[:3] @ V[:3]
        torch.testing.assert_close(layer.scaling * layer.lora_B[part] @ layer.lora_A[part], best, atol=1e-5, rtol=1e-4)
    with bare(layer):
        assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all((p.grad is None) is not p.requires_grad for p in layer.parameters())
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        f"lora_{letter}.{part}" for letter in "AB" for part in "qv"
    ]


def test_a_rank_above_that_of_the_part():
    with pytest.raises(ValueError, match="a matrix of 6 x 12 has no 7 singular values"):
        PiSSALinear(nn.Linear(12, 18), 7, 1.0, {"q": RowBlocks(2, 9, 0, 3)})


def test_of_a_large_matrix_it_is_close_to_the_best_and_the_same_each_time():
    torch.manual_seed(1)
    W = torch.randn(1100, 1200) / 30 + torch.randn(1100, 20) @ torch.randn(20, 1200) / 20
    state = torch.get_rng_state()
    U, S, V = principal(W, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip((U, S, V), principal(W, 8), strict=True))
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[:8], rtol=1e-4, atol=0)
    torch.testing.assert_close(U * S, W @ V.T, rtol=1e-3, atol=1e-3)
