"""Many adapters over one frozen base: h_i = W x_i + s_a B_a A_a x_i, where row i of the batch names adapter a, or none.

W x is computed once for all rows. The rows of one adapter are brought together, and the adapters' A and B are stacked
(zero rows of A and B where a rank is smaller), so that a batch takes one grouped product for A and one for B however
many rows and adapters it has. For inference: nothing here trains.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.lora import LoRALinear, Rows, dimensions


class ManyLoRALinear(nn.Module):
    """A frozen layer and the adapters that share it; computes the bare base until told otherwise.

    Attributes:
        base: the frozen layer, the only submodule: an adapter costs its own A and B and nothing else.
        adapters: name -> the adapter's layer over this very base. Those that don't adapt this layer aren't there.
        enabled: False computes the bare base, whatever `use` and `mix` chose.
    """

    def __init__(self, base: nn.Linear | Conv1D):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = dimensions(base)
        self.adapters: dict[str, LoRALinear] = {}
        self.enabled = True
        self.use(None)

    def use(self, name: str | None) -> None:
        """All rows get adapter `name`, or the bare base: None, or an adapter that leaves this layer alone."""
        self._name = name  # not the layer: as an attribute it would become a submodule
        self._batch = 1
        self._groups: list[Group] = []

    def mix(self, names: Sequence[str | None]) -> None:
        """Row i gets adapter `names[i]`. The adapters that are named are copied into stacks, until the next `use`."""
        self._name = None
        self._batch, self._groups = len(names), groups(self.adapters, names)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)

        In a mixed batch the first dimension is the rows', or a multiple of them (beams, or batch and tokens in one).
        """
        if not self.enabled:
            return self.base(x)
        if self._name in self.adapters:
            return self.adapters[self._name](x)
        y = self.base(x)
        if self._groups:
            if x.shape[0] % self._batch:
                raise ValueError(f"{x.shape[0]} rows in a batch for which {self._batch} adapters were named")
            rows_of_x = x.reshape(self._batch, -1, self.in_features)
            rows_of_y = y.view(self._batch, -1, self.out_features)
            for group in self._groups:
                group.add_(rows_of_y, rows_of_x)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ManyLoRALinear":
        """As `nn.Module`: what moves the model moves the adapters too."""
        super()._apply(fn, recurse)
        for layer in self.adapters.values():
            layer._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"adapters={list(self.adapters)}"


class Group(NamedTuple):
    """The adapters of a batch that move the same rows of the output, stacked, and the batch's rows that they serve.

    output: the rows of the output. At: (adapters, in, rank). sBt: (adapters, rank, rows of the output).
    slots: (adapters * most,) the batch's rows, those of an adapter together; an adapter with fewer than `most` has its
    first one again. served: (n,) the batch's rows that one of the adapters serves, and slot: (n,) where each is in slots.
    """

    output: Rows
    At: Tensor
    sBt: Tensor
    slots: Tensor
    served: Tensor
    slot: Tensor

    def add_(self, y: Tensor, x: Tensor) -> None:
        """y_i[output] += s_a B_a A_a x_i in place; y: (batch, tokens, out), x: (batch, tokens, in)."""
        X = x[self.slots].reshape(len(self.At), -1, x.shape[-1])  # (adapters, most * tokens, in)
        update = torch.bmm(torch.bmm(X, self.At), self.sBt)  # (adapters, most * tokens, rows of the output)
        update = update.view(len(self.slots), x.shape[1], self.output.blocks, self.output.length)
        self.output.of(y).index_add_(0, self.served, update[self.slot].to(y.dtype))


def groups(adapters: dict[str, LoRALinear], names: Sequence[str | None]) -> list[Group]:
    """One group for each kind of output rows: q and v of a fused projection are two."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name in adapters:
            members.setdefault(name, []).append(i)
    found: dict[Rows, dict[str, str]] = {}  # output rows -> adapter -> the part of it that moves them
    for name in members:
        for part, rows in adapters[name].rows.items():
            found.setdefault(rows, {})[name] = part
    return [group(output, parts, adapters, members) for output, parts in found.items()]


@torch.no_grad()
def group(output: Rows, parts: dict[str, str], adapters: dict[str, LoRALinear], members: dict[str, list[int]]) -> Group:
    """Stack `parts` (adapter -> part) in the base's dtype, B with its scaling."""
    layers = [adapters[name] for name in parts]
    rank = max(layer.rank for layer in layers)
    weight = layers[0].weight
    At = weight.new_zeros(len(layers), layers[0].in_features, rank)
    sBt = weight.new_zeros(len(layers), rank, output.size)
    for i, (layer, part) in enumerate(zip(layers, parts.values(), strict=True)):
        At[i, :, : layer.rank] = layer.lora_A[part].T
        sBt[i, : layer.rank] = layer.scaling * layer.lora_B[part].T
    rows = [members[name] for name in parts]
    most = max(map(len, rows))
    slots = [i for own in rows for i in own + own[:1] * (most - len(own))]
    served = [i for own in rows for i in own]
    slot = [a * most + j for a, own in enumerate(rows) for j in range(len(own))]
    return Group(output, At, sBt, *(torch.tensor(i, device=weight.device) for i in (slots, served, slot)))
