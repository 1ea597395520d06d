"""Prompt tuning: learned vectors at the input, in front of an example's own (Lester et al. 2021, arXiv:2104.08691).

The n virtual tokens are n more rows of the vocabulary: the ids V, V + 1, ..., V + n - 1 after the base's V. An example gets
these ids in front of its own, and all else (lengths, positions, packing, scoring) follows by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VirtualTokens(nn.Module):
    """A frozen input embedding with n more rows, which train.

    Attributes:
        base: the frozen embedding of V ids.
        prompt: (n, width), float32 whatever the base's dtype.
    """

    def __init__(self, base: nn.Embedding, prompt: Tensor):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prompt = nn.Parameter(prompt.detach().float().clone())

    @property
    def ids(self) -> list[int]:
        """The virtual tokens' ids, in order."""
        return list(range(self.num_embeddings, self.num_embeddings + len(self.prompt)))

    @property
    def num_embeddings(self) -> int:
        """V, without the virtual tokens."""
        return self.base.num_embeddings

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., width)"""
        virtual = ids >= self.num_embeddings
        found = self.base(ids.masked_fill(virtual, 0))
        learned = F.embedding((ids - self.num_embeddings).clamp(min=0), self.prompt)
        return torch.where(virtual[..., None], learned.to(found.dtype), found)
