"""Some rows of an embedding that are trained, and the same rows of the head that is tied to it.

The rows are in float32 whatever the base's dtype, and replace the base's where they compute.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lora_ft.nn.whole import LikeBase, with_parameters


class TokenRows(LikeBase):
    """A frozen embedding and the rows of some tokens, which are trained.

    Attributes:
        tokens: their ids, which `ids` (n,) has on the device.
        trained: an embedding of the base's class with their rows alone (n, width), float32.
    """

    def __init__(self, base: nn.Embedding, ids: Sequence[int]):
        super().__init__(base)
        device = base.weight.device
        self.tokens = [*ids]
        self.register_buffer("ids", torch.tensor(self.tokens, device=device), persistent=False)
        slots = torch.full((base.num_embeddings,), -1, device=device)
        slots[self.ids] = torch.arange(len(ids), device=device)
        self.register_buffer("slots", slots, persistent=False)  # token -> its row in `trained`, or -1
        rows = base.weight.detach()[self.ids].float()
        self.trained = with_parameters(base, {"weight": rows}).requires_grad_(True)
        self.trained.num_embeddings = len(ids)
        # the padding's row has no gradient, as in the base
        self.trained.padding_idx = self.tokens.index(base.padding_idx) if base.padding_idx in ids else None

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., width), in the base's dtype."""
        y = self.base(ids)
        if not self.enabled:
            return y
        slots = self.slots[ids]
        rows = functional_call(self.trained, {"weight": self.rows}, slots.clamp(min=0))
        return torch.where((slots >= 0)[..., None], rows, y)

    @property
    def rows(self) -> Tensor:
        """The trained rows (n, width) in the base's dtype."""
        return self.trained.weight.to(self.base.weight.dtype)

    def merged(self) -> nn.Module:
        """An embedding of the base's class with the trained rows in place of the base's."""
        weight = self.base.weight.detach().index_copy(0, self.ids, self.rows.detach())
        return with_parameters(self.base, {"weight": weight}).train(self.training)


class TiedHeadRows(LikeBase):
    """A frozen head whose weight is that of an embedding, with that one's trained rows."""

    def __init__(self, base: nn.Linear, embedding: TokenRows):
        super().__init__(base)
        self.trained = embedding.trained
        self.register_buffer("ids", embedding.ids, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> logits (..., vocabulary)."""
        y = self.base(x)
        if not self.enabled:
            return y
        bias = None if self.base.bias is None else self.base.bias[self.ids]
        return y.index_copy_(-1, self.ids, F.linear(x, self.rows, bias))

    @property
    def rows(self) -> Tensor:
        """The trained rows (n, width) in the base's dtype."""
        return self.trained.weight.to(self.base.weight.dtype)

    def merged(self) -> nn.Module:
        """A head of the base's class with the trained rows in place of the base's."""
        weight = self.base.weight.detach().index_copy(0, self.ids, self.rows.detach())
        values = {name: p.detach() for name, p in self.base.named_parameters()} | {"weight": weight}
        return with_parameters(self.base, values).train(self.training)
