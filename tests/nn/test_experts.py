"""Unpacked experts against transformers' own."""

import pytest
import torch

from lora_ft.nn.experts import UnpackedExperts, is_packed
from tests.helpers.families import tiny_model

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss"]


@pytest.mark.parametrize("family", MIXTURES)
def test_output_and_gradient_are_those_of_the_experts_and_nothing_is_copied(family):
    experts = next(m for m in tiny_model(family).modules() if is_packed(m))
    own, x = UnpackedExperts(experts), torch.randn(9, 32, requires_grad=True)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(9)])
    index[:, 0] = torch.where(
        index[:, 0] == 1, index[:, 1], index[:, 0]
    )  # some twice, so that one expert has few tokens
    weights = torch.rand(9, 2)
    y, expected = own(x, index, weights), experts(x, index, weights)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    for got, right in zip(
        torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x), strict=True
    ):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)
    layer = own.down_proj[2]
    assert layer.weight.shape == (32, experts.down_proj.shape[1 if family == "gpt_oss" else 2])
    assert layer.weight.data_ptr() == experts.down_proj[2].data_ptr()
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in experts.parameters())
    assert not is_packed(own) and is_packed(experts)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_without_tokens_computes_nothing(family):
    own = UnpackedExperts(next(m for m in tiny_model(family).modules() if is_packed(m)))
    own.down_proj[1].forward = None
    index = torch.tensor([[0, 2], [2, 0]])
    assert own(torch.randn(2, 32), index, torch.ones(2, 2)).shape == (2, 32)
