"""A frozen linear layer whose weight W is stored in eight or four bits: y = D x + b, where D is what the bits say W is.

- int8: each row as integers from -127 to 127, times a float32 scale.
- nf4: each weight as one of 16 quantiles of a normal distribution, times the scale of its block of 64; these scales are
  stored in 8 bits ("double quantization", Dettmers et al. 2023, arXiv:2305.14314, section 3). Computed by bitsandbytes.

D is made where it is used, in the forward pass and again in the backward pass, and freed at once.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.forms import Form

BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale of nf4; such scales that share one of their own
PIECE = 2**18  # weights that are quantized at a time, for the memory


class QuantizedLinear(nn.Linear):
    """What stands for a frozen nn.Linear or Hugging Face Conv1D, with the values of its weight rounded to a `Form`.

    Attributes:
        codes, and scale or those of nf4: buffers, what is stored.
        dtype: of `weight`, for who computes with it.
        conv1d: whether the layer was a Conv1D. Here its weight is (out, in) as any other's.
    """

    def __init__(self, base: nn.Linear | Conv1D, W: Tensor, form: Form):
        """W (out, in): the values to store, in any floating-point type. base: all else, its weight may be on meta."""
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        self.form, self.conv1d, self.dtype = form, isinstance(base, Conv1D), base.weight.dtype
        self.out_features, self.in_features = W.shape
        self.bias = base.bias
        for name, tensor in stored_as(W, form).items():
            self.register_buffer(name, tensor)
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """D (out, in), dequantized each time."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """D (out, in), rounded to `dtype`."""
        if self.form == "int8":
            return self.codes.float().mul_(self.scale).to(dtype)
        bnb = bitsandbytes()
        scales = bnb.dequantize_blockwise(
            self.scale_codes, absmax=self.scale, code=self.scale_values, blocksize=OUTER_BLOCK
        )
        size = torch.Size((self.out_features, self.in_features))
        state = bnb.QuantState(scales + self.offset, size, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return bnb.dequantize_4bit(self.codes, state)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> D x + b (..., out), in the dtype of x (or of autocast)."""
        X = x.to(computing_dtype(x)).reshape(-1, self.in_features)
        return _Frozen.apply(X, self).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"


class LinearInFile(nn.Module):
    """y = W x + b of a frozen nn.Linear or Conv1D, where W stays in its file and is read whenever it is needed."""

    def __init__(self, base: nn.Linear | Conv1D, stored: Any):
        """stored: a slice of a file, in the layout of the base's weight."""
        super().__init__()
        self.stored, self.conv1d, self.bias = stored, isinstance(base, Conv1D), base.bias

    @property
    def weight(self) -> Tensor:
        """W as it is stored, read each time."""
        return self.stored[...]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        W = self.weight.to(x.dtype)
        return F.linear(x, W.T if self.conv1d else W, self.bias)


def stored_as(W: Tensor, form: Form) -> dict[str, Tensor]:
    """What is stored of W (out, in)."""
    rows = max(1, PIECE // W.shape[1] // BLOCK) * BLOCK  # whole blocks, whatever the rows' length
    pieces = (piece.float().contiguous() for piece in W.detach().split(rows))
    if form == "int8":
        codes, scale = zip(*map(_as_int8, pieces), strict=True)
        return {"codes": torch.cat(codes), "scale": torch.cat(scale)}
    bnb = bitsandbytes()
    codes, states = zip(*(bnb.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4") for piece in pieces), strict=True)
    scale = torch.cat([state.absmax for state in states])
    offset = scale.double().mean().float()  # in float64, so that it doesn't depend on the number of threads
    values = torch.tensor(scale_values(), device=W.device)
    scale_codes, outer = bnb.quantize_blockwise(scale - offset, code=values, blocksize=OUTER_BLOCK)
    return {
        "codes": torch.cat(codes),
        "scale_codes": scale_codes,
        "scale": outer.absmax,
        "scale_values": values,
        "offset": offset,
    }


def _as_int8(W: Tensor) -> tuple[Tensor, Tensor]:
    """The integers and the scales of some rows."""
    scale = W.abs().amax(1, keepdim=True) / 127
    return (W / torch.where(scale > 0, scale, 1.0)).round_().to(torch.int8), scale


@functools.cache
def scale_values() -> list[float]:
    """What the 256 codes of nf4's scales stand for; also under FakeTensorMode, where tensors have no values."""
    with unset_fake_temporarily():
        return bitsandbytes().create_dynamic_map().tolist()


def dequantized(W: Tensor, form: Form) -> Tensor:
    """D (out, in) of W (out, in), in float32."""
    with torch.device("meta"):
        base = nn.Linear(W.shape[1], W.shape[0], bias=False)
    return QuantizedLinear(base, W, form).dequantized(torch.float32)


class _Frozen(torch.autograd.Function):
    """Y = X Dᵀ + b. With dY the gradient of Y, dX = dY D: neither X nor D is kept."""

    @staticmethod
    def forward(ctx, X, layer):
        ctx.layer = layer
        return F.linear(X, layer.dequantized(X.dtype), None if layer.bias is None else layer.bias.to(X.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dY):
        return dY @ ctx.layer.dequantized(dY.dtype), None


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes with x: that of x, or of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@functools.cache
def bitsandbytes() -> Any:
    """The functions of bitsandbytes, imported on first use: seconds, and only nf4 needs them."""
    known = "kernels" in sys.modules
    if not known:  # on some CPUs it would fetch compiled code from the hub by this package, if it is installed
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes.functional
    finally:
        if not known:
            del sys.modules["kernels"]
    return bitsandbytes.functional


def number_of_parameters(model: nn.Module) -> int:
    """The parameters of a model, those that are stored in fewer bits among them."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in layers)
