"""Several adapters over one frozen base: h_i = W x_i + s_a B_a A_a x_i, where row i of a batch names adapter a, or none.

W x is computed once for all rows. The A and B of the adapters in a batch are stacked, padded with zeros to the largest rank,
and the rows are grouped by adapter: a batch takes one batched product with A and one with B, however many rows and adapters
it has. For inference only: nothing here trains.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import AdaptedLayer, place
from lora_ft.nn.dora import DoRALinear
from lora_ft.nn.lora import LoRALinear, RowBlocks


class MultiLoRALinear(AdaptedLayer):
    """A frozen layer and the adapters that share it; computes the bare base until `use` or `mix` is called.

    adapters: name -> this adapter's LoRALinear over `base`; adapters that leave this layer unchanged are absent. `base` is
    the only submodule, so that an adapter adds the memory of its A and B alone.
    """

    def __init__(self, base: nn.Linear | Conv1D):
        super().__init__(base)
        self.adapters: dict[str, LoRALinear] = {}
        self.use(None)

    def use(self, name: str | None) -> None:
        """Compute all rows with adapter `name`, or with the bare base if it is None or does not adapt this layer."""
        self._name = name  # not the layer, which as an attribute would become a submodule
        self._batch = 1
        self._groups: list[Group] = []

    def mix(self, names: Sequence[str | None]) -> None:
        """Compute row i with adapter `names[i]`, from stacked copies of the named adapters, until the next `use`."""
        self._name = None
        self._batch, self._groups = len(names), groups(self.adapters, names)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out). After `mix` the first dimension is a multiple of the number of names (beams, for one)."""
        if not self.enabled:
            return self.base(x)
        if self._name in self.adapters:
            return self.adapters[self._name](x)
        y = self.base(x)
        if self._groups and x.shape[0] % self._batch:
            raise ValueError(f"a batch of {x.shape[0]} rows is not a multiple of the {self._batch} adapters named")
        for group in self._groups:
            group.add_(y.view(self._batch, -1, self.out_features), x.reshape(self._batch, -1, self.in_features))
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MultiLoRALinear":
        """Apply `fn` to the adapters too, so that `to`, `half` and so on move them with the model."""
        super()._apply(fn, recurse)
        for layer in self.adapters.values():
            layer._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"adapters={list(self.adapters)}"


class Group(NamedTuple):
    """The adapters of a batch that change the same rows of the output, stacked, and the batch rows that they serve."""

    output: RowBlocks  # the rows of the output
    At: Tensor  # (adapters, in, rank), zero-padded to the largest rank
    sBt: Tensor  # (adapters, rank, rows of the output); with DoRA's gain
    stretch: Tensor | None  # (adapters, blocks, length) DoRA's gain - 1; None if no adapter is DoRA's
    bias: Tensor | None  # the base's (out,)
    # (adapters * n,) batch rows by adapter, where n is the most rows of one; one with fewer has its first row repeated
    slots: Tensor
    served: Tensor  # (m,) the batch rows that one of the adapters serves
    slot: Tensor  # (m,) the position of each of these in `slots`

    def add_(self, y: Tensor, x: Tensor) -> None:
        """y_i[output] += s_a B_a A_a x_i in place; y: (batch, tokens, out), x: (batch, tokens, in).

        With DoRA y_i - b is multiplied by the gain, and so is what is added.
        """
        X = x[self.slots].reshape(len(self.At), -1, x.shape[-1])  # (adapters, n * tokens, in)
        update = torch.bmm(torch.bmm(X, self.At), self.sBt)  # (adapters, n * tokens, rows of the output)
        update = update.view(len(self.slots), x.shape[1], self.output.blocks, self.output.length)
        own = self.output.of(y)
        if self.stretch is not None:
            without_bias = own[self.served] - (0 if self.bias is None else self.output.of(self.bias))
            stretch = self.stretch[self.slot // (len(self.slots) // len(self.At))]
            own.index_add_(0, self.served, (without_bias * stretch[:, None]).to(y.dtype))
        own.index_add_(0, self.served, update[self.slot].to(y.dtype))


def groups(adapters: dict[str, LoRALinear], names: Sequence[str | None]) -> list[Group]:
    """One group for each set of output rows: the q and v parts of a fused projection make two; see `MultiLoRALinear.mix`."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name in adapters:
            members.setdefault(name, []).append(i)
    parts_of: dict[RowBlocks, dict[str, str]] = {}  # output rows -> adapter -> its part that changes them
    for name in members:
        for part, rows in adapters[name].rows.items():
            parts_of.setdefault(rows, {})[name] = part
    return [group(output, parts, adapters, members) for output, parts in parts_of.items()]


@torch.no_grad()
def group(
    output: RowBlocks, parts: dict[str, str], adapters: dict[str, LoRALinear], members: dict[str, list[int]]
) -> Group:
    """Stack one part of each adapter, in the base's dtype; B times its scaling.

    parts: adapter -> the part that changes the rows `output`. members: adapter -> its rows of the batch.
    """
    layers = [adapters[name] for name in parts]
    rank = max(layer.rank for layer in layers)
    dtype, device = place(layers[0].base)
    At = torch.zeros(len(layers), layers[0].in_features, rank, dtype=dtype, device=device)
    sBt = torch.zeros(len(layers), rank, output.size, dtype=dtype, device=device)
    stretch = torch.zeros(len(layers), output.blocks, output.length, device=device)
    for i, (layer, part) in enumerate(zip(layers, parts.values(), strict=True)):
        At[i, :, : layer.rank] = layer.lora_A[part].T
        sBt[i, : layer.rank] = layer.scaling * layer.lora_B[part].T
        if isinstance(layer, DoRALinear):
            gain = output.of(layer.gain())
            sBt[i, : layer.rank] *= gain.flatten()
            stretch[i] = gain - 1
    rows = [members[name] for name in parts]
    n = max(map(len, rows))
    slots = [i for own in rows for i in own + own[:1] * (n - len(own))]
    served = [i for own in rows for i in own]
    slot = [a * n + j for a, own in enumerate(rows) for j in range(len(own))]
    any_dora = any(isinstance(layer, DoRALinear) for layer in layers)
    indices = (torch.tensor(i, device=device) for i in (slots, served, slot))
    return Group(output, At, sBt, stretch if any_dora else None, layers[0].bias, *indices)
