"""A module that is trained in full: the base's, frozen, and a copy of it that is trained and computed instead.

The copy is in float32 whatever the base's dtype, as A and B are, and is rounded to that dtype where it computes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_ft.nn.adapted import AdaptedModule


class LikeBase(AdaptedModule):
    """An adapted module whose other attributes, such as `weight` or `num_embeddings`, are the base's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # not set yet
                raise
            return getattr(self.base, name)


class WholeModule(LikeBase):
    """A frozen module without submodules (a head, a norm, an embedding) and the copy that is trained.

    Attributes:
        trained: the copy, with float32 parameters.
    """

    def __init__(self, base: nn.Module):
        super().__init__(base)
        values = {name: p.detach().to(torch.float32, copy=True) for name, p in base.named_parameters()}
        self.trained = with_parameters(base, values).requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy computes, in the base's dtype."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        return functional_call(self.trained, self._rounded(), args, kwargs)

    def merged(self) -> nn.Module:
        """A module of the base's class with the trained values, rounded to its dtype."""
        values = {name: value.detach().clone() for name, value in self._rounded().items()}
        return with_parameters(self.base, values).train(self.training)

    def _rounded(self) -> dict[str, Tensor]:
        """The copy's parameters in the dtypes of the base's."""
        dtypes = {name: parameter.dtype for name, parameter in self.base.named_parameters()}
        return {name: parameter.to(dtypes[name]) for name, parameter in self.trained.named_parameters()}


def with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module without submodules, with other frozen parameters; buffers are shared."""
    twin = copy.copy(module)
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(values[name], requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    return twin
