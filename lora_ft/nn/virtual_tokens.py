"""Prompt tuning: learned input vectors in front of an example's own (Lester et al. 2021, arXiv:2104.08691, section 2).

The n virtual tokens are n more rows of the vocabulary: their ids are V, ..., V + n - 1 after the base's 0, ..., V - 1. An
example gets these ids in front of its own; lengths, positions, packing and scoring need no special case.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VirtualTokens(nn.Module):
    """A frozen input embedding with n more rows, which train.

    Attributes:
        base: the frozen embedding of V ids; `num_embeddings` (V) and `weight` (V, width) are the base's.
        prompt: (n, width), float32 whatever the base's dtype.
    """

    def __init__(self, base: nn.Embedding, prompt: Tensor):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prompt = nn.Parameter(prompt.detach().float().clone())

    @property
    def ids(self) -> list[int]:
        """The ids of the virtual tokens, in order."""
        return list(range(self.num_embeddings, self.num_embeddings + len(self.prompt)))

    num_embeddings = property(lambda self: self.base.num_embeddings)
    weight = property(lambda self: self.base.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> vectors (..., width), in the base's dtype."""
        virtual = ids >= self.num_embeddings
        frozen = self.base(ids.masked_fill(virtual, 0))
        learned = F.embedding((ids - self.num_embeddings).clamp(min=0), self.prompt)
        return torch.where(virtual[..., None], learned.to(frozen.dtype), frozen)
