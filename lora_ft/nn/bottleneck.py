"""The bottleneck adapter: h = y + U act(D y + d) + u (Houlsby et al. 2019, arXiv:1902.00751, section 2.1, figure 2).

y = f(x) is the output of a frozen layer f; D (size, width) projects it down, U (width, size) up again. U and u start at zero,
so the layer starts as its base (the paper starts near zero); D starts Kaiming-uniform, so that U has a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import AdaptedLayer, place
from lora_ft.nn.lora import draw_

NONLINEARITIES = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Bottleneck(AdaptedLayer):
    """A frozen layer followed by a trainable bottleneck with a residual.

    Attributes:
        down, up: linear layers with D, d and U, u, float32 whatever the base's dtype.
        nonlinearity: a key of NONLINEARITIES.
    """

    def __init__(self, base: nn.Linear | Conv1D, size: int, nonlinearity: str, generator: torch.Generator):
        super().__init__(base)
        self.nonlinearity, width = nonlinearity, self.out_features
        float32 = dict(dtype=torch.float32, device=place(base)[1])
        self.down, self.up = nn.Linear(width, size, **float32), nn.Linear(size, width, **float32)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
        draw_(self.down.weight, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> h (..., width), in the dtype of y."""
        y = self.base(x)
        if not self.enabled:
            return y
        D, d, U, u = (p.to(y.dtype) for p in (self.down.weight, self.down.bias, self.up.weight, self.up.bias))
        return y + F.linear(NONLINEARITIES[self.nonlinearity](F.linear(y, D, d)), U, u)

    def extra_repr(self) -> str:
        return f"size={self.down.out_features}, nonlinearity={self.nonlinearity}"
