"""Quantized layers against what they are defined by: a dense layer with the dequantized weight, in plain autograd."""

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import out_in
from lora_ft.nn.quantized import QuantizedLinear, dequantized, number_of_parameters

FORMS = ("int8", "nf4")
IN, OUT = 96, 40


def layer(conv=False, bias=True) -> nn.Linear | Conv1D:
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, bias=bias)
    nn.init.normal_(base.weight)
    return base.requires_grad_(False)


def quantized(base, form) -> QuantizedLinear:
    return QuantizedLinear(base, out_in(base), form)


@pytest.mark.parametrize("conv, bias", [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradient_are_those_of_the_dequantized_weight(form, conv, bias):
    base = layer(conv, bias)
    ours = quantized(base, form)
    x = torch.randn(2, 5, IN, requires_grad=True)
    y = ours(x)
    wanted = F.linear(x, ours.weight, base.bias)
    assert torch.equal(y, wanted)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, wanted)))
    assert ours(x.detach()).grad_fn is None
    y += 1  # as residual streams do


@pytest.mark.parametrize("form", FORMS)
def test_a_product_keeps_neither_its_input_nor_the_weight(form):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantized(layer(), form)(torch.randn(5, IN, requires_grad=True))
    assert not kept


def test_int8_errs_by_half_a_step_of_its_row_at_most():
    W = torch.randn(OUT, IN)
    W[3] = 0
    step = W.abs().amax(1, keepdim=True) / 127
    assert ((dequantized(W, "int8") - W).abs() <= 0.5001 * step).all()


def test_nf4_is_that_of_bitsandbytes_with_double_quantization():
    W = torch.randn(256, 512)
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True))
    torch.testing.assert_close(dequantized(W, "nf4"), theirs, rtol=1e-5, atol=1e-6)
    torch.set_num_threads(2)
    try:
        assert torch.equal(dequantized(W, "nf4"), dequantized(W, "nf4"))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("form, share", [("int8", 0.27), ("nf4", 0.16)])
def test_what_is_stored_and_how_many_weights_that_is(form, share):
    base = nn.Linear(512, 512)
    ours = quantized(base, form)
    assert sum(buffer.nbytes for buffer in ours.buffers()) <= share * base.weight.nbytes
    assert number_of_parameters(ours) == number_of_parameters(base) == 512 * 513


@pytest.mark.parametrize("form", FORMS)
def test_precisions(form):
    base = layer().bfloat16()
    ours, x = quantized(base, form), torch.randn(3, IN)
    assert ours.weight.dtype == torch.bfloat16 and ours(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(ours.weight, ours.dequantized(torch.float32).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized(layer(), form)(x), quantized(layer(), form)(x.bfloat16()))
