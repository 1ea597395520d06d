"""What all adapted layers have in common, and two modes of a model: computing its bare base, and eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.quantized import QuantizedLinear


class AdaptedModule(nn.Module):
    """A frozen module of the base, and what a subclass computes beside it or instead.

    Attributes:
        base: the frozen module, unchanged.
        enabled: False computes the base alone.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.enabled = True


class AdaptedLayer(AdaptedModule):
    """A frozen nn.Linear or Hugging Face Conv1D, and what a subclass adds to it; `weight` and `bias` are the base's."""

    base: nn.Linear | Conv1D

    def __init__(self, base: nn.Linear | Conv1D):
        super().__init__(base)
        self.in_features, self.out_features = dimensions(base)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Within it the adapted modules of `model` compute their bases alone; afterwards each is as it was."""
    before = {module: module.enabled for module in model.modules() if isinstance(module, AdaptedModule)}
    try:
        for module in before:
            module.enabled = False
        yield
    finally:
        for module, enabled in before.items():
            module.enabled = enabled


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it `model` is in eval mode; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def out_in(base: nn.Linear | Conv1D) -> Tensor:
    """The weight as (out, in), as nn.Linear stores it; for a Conv1D, which stores (in, out), a transposed view."""
    return base.weight.T if isinstance(base, Conv1D) else base.weight


def with_weight(base: nn.Linear | Conv1D, weight: Tensor) -> nn.Linear | Conv1D:
    """A frozen layer of the class that `base` has, or had before it was quantized, with another weight (out, in)."""
    out_features, in_features = weight.shape
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        if is_conv1d(base):
            layer, weight = Conv1D(out_features, in_features), weight.T.contiguous()
        else:
            layer = nn.Linear(in_features, out_features, bias=base.bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = base.bias
    return layer.train(base.training)


def dimensions(base: nn.Linear | Conv1D) -> tuple[int, int]:
    """(in, out) of a layer."""
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def is_conv1d(base: nn.Linear | Conv1D) -> bool:
    """Whether a layer is a Conv1D, quantized or not."""
    return isinstance(base, Conv1D) or (isinstance(base, QuantizedLinear) and base.conv1d)


def place(base: nn.Linear | Conv1D) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device of a layer's weight, which isn't dequantized for it."""
    quantized = isinstance(base, QuantizedLinear)
    return (base.dtype, base.codes.device) if quantized else (base.weight.dtype, base.weight.device)
