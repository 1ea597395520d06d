"""DoRA's layer against its formula with plain autograd, in double precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import bare, out_in
from lora_ft.nn.dora import DoRALinear
from lora_ft.nn.lora import RowBlocks

IN, OUT, RANK, S = 12, 18, 3, 1.7
PARTS = {"whole": None, "q and v of heads": {"q": RowBlocks(2, 9, 0, 3), "v": RowBlocks(2, 9, 6, 3)}}


def build(parts=None, conv=False, bias=True) -> DoRALinear:
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, bias=bias)
    for parameter in base.parameters():
        parameter.data.normal_()
    layer = DoRALinear(base, RANK, S, PARTS.get(parts))
    layer.start()
    for parameter in (*layer.lora_B.values(), *layer.magnitude.values()):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def formula(layer: DoRALinear, x: torch.Tensor) -> torch.Tensor:
    """h = m (W + s B A) / |W + s B A| x + b, the norm a constant for the gradient, row by row."""
    W = out_in(layer.base)
    change, lengths = torch.zeros_like(W), W.norm(dim=1)
    for part, rows in layer.rows.items():
        where = rows.of(torch.arange(OUT)).flatten()
        change = change.index_copy(0, where, layer.scaling * layer.lora_B[part] @ layer.lora_A[part])
        lengths = lengths.index_copy(0, where, layer.magnitude[part])
    adapted = W + change
    return F.linear(x, (lengths / adapted.norm(dim=1).detach())[:, None] * adapted, layer.bias)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("conv, bias", [(False, True), (False, False), (True, True)])
def test_output_and_gradients_equal_the_formula(parts, conv, bias):
    layer = build(parts, conv, bias)
    x = torch.randn(2, 5, IN, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(wanted) == 1 + 3 * len(layer.rows)
    weights = torch.randn(2, 5, OUT)
    y, expected = layer(x), formula(layer, x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for got, right in zip(
        torch.autograd.grad((y * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, right, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.merged()(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", PARTS)
def test_it_starts_as_its_base_to_rounding(parts):
    layer = DoRALinear(nn.Linear(IN, OUT), RANK, S, PARTS[parts])
    layer.start()
    x = torch.randn(7, IN)
    torch.testing.assert_close(layer(x), layer.base(x), atol=1e-6, rtol=1e-6)
    with bare(layer):
        assert torch.equal(layer(x), layer.base(x))


@torch.no_grad()
def test_what_is_kept_for_inference_follows_every_change():
    layer, x = build().eval(), torch.randn(4, IN)
    layer(x)
    for name in ("lora_A", "lora_B", "magnitude"):
        getattr(layer, name)["all"].mul_(1.5)
        torch.testing.assert_close(layer(x), formula(layer, x), atol=1e-5, rtol=1e-5)
    layer.load_state_dict({name: tensor * 2 for name, tensor in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), formula(layer, x), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double()).float(), layer(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_kept_for_inference_does_not_outlive_a_step(fused):
    layer, x = build(), torch.randn(4, IN)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=fused)
    for _ in range(2):
        layer.train()(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), formula(layer, x), atol=1e-5, rtol=1e-5)


def test_the_gain_is_not_rounded_to_bfloat16():
    layer = build(bias=False)
    layer.base.bfloat16()
    layer.keep_lengths()
    layer.magnitude["all"].data *= 1.01  # bfloat16 has 1.0078 and 1.0156
    x = torch.randn(500, IN).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    ratio = y.float().norm() / (x.float() @ (out_in(layer.base).float() + layer.delta()).T).norm()
    assert ratio.item() == pytest.approx(1.01, abs=1e-3)
