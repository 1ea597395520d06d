"""PiSSA: A and B start as the principal part of W (Meng et al. 2024, arXiv:2404.02948, section 3).

With the largest singular values of W = U S Vᵀ, A₀ = (S/s)^½ Vᵀ and B₀ = U (S/s)^½ are what A and B start from, and

    h = (W - s B₀ A₀) x + s B A x + b = W x + s [B, -B₀] [A; A₀] x + b

The paper takes s B₀ A₀ out of W. Here W stays whole, and the layer is LoRA of twice the rank whose other half is frozen. So it
starts as its base, it is saved as ordinary LoRA of the untouched base, and every other use of the base sees W.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import out_in, place
from lora_ft.nn.lora import LoRALinear, RowBlocks

EXACT = 1024  # rows or columns up to which all singular values are computed; above, the largest by subspace iteration
ITERATIONS, MORE = 16, 16  # of these; columns beside those that are wanted


class PiSSALinear(LoRALinear):
    """A LoRA layer that trains the principal part of its base.

    Attributes:
        start_A, start_B: part -> A₀ (rank, in) and B₀ (rows of the part, rank), float32, frozen.
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, scaling: float, rows: dict[str, RowBlocks] | None = None):
        super().__init__(base, rank, scaling, rows)
        if (part := next((p for p, r in self.rows.items() if rank > min(r.size, self.in_features)), None)) is not None:
            size = f"{self.rows[part].size} x {self.in_features}"
            raise ValueError(f"a matrix of {size} has no {rank} singular values")
        self.start_A, self.start_B = (
            nn.ParameterDict((part, torch.zeros_like(M)) for part, M in of.items()) for of in (self.lora_A, self.lora_B)
        )
        self.start_A.requires_grad_(False)
        self.start_B.requires_grad_(False)

    @property
    def stored_rank(self) -> int:
        return 2 * self.rank

    @torch.no_grad()
    def start(self, generator: torch.Generator | None = None) -> None:
        """Take the base's principal part; nothing is drawn."""
        if place(self.base)[1].type == "meta":
            return
        W = out_in(self.base).float()
        for part, rows in self.rows.items():
            U, S, Vt = principal(rows.of(W.T).flatten(-2).T, self.rank)
            root = (S / self.scaling).sqrt()
            for mine, start, value in (
                (self.lora_A, self.start_A, root[:, None] * Vt),
                (self.lora_B, self.start_B, U * root),
            ):
                mine[part].copy_(value)
                start[part].copy_(value)

    def pair(self, part: str) -> tuple[Tensor, Tensor]:
        """[A; A₀] (2 rank, in) and [B, -B₀] (rows of the part, 2 rank)."""
        A, B = super().pair(part)
        return torch.cat([A, self.start_A[part]]), torch.cat([B, -self.start_B[part]], 1)

    def copy_pair(self, part: str, A: Tensor, B: Tensor) -> None:
        """Take A, A₀, B and B₀ from the pair of a part."""
        super().copy_pair(part, A[: self.rank], B[:, : self.rank])
        self.start_A[part].copy_(A[self.rank :])
        self.start_B[part].copy_(-B[:, self.rank :])


def principal(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, rank), S (rank,) and Vᵀ (rank, columns) of the largest singular values of W (rows, columns).

    Those of a large matrix are close to the best ones, by subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm
    4.4), with the same random start each time.
    """
    if min(W.shape) <= max(EXACT, rank + MORE):
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], S[:rank], Vt[:rank]
    with torch.random.fork_rng([W.device] if W.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W, rank + MORE, niter=ITERATIONS)
    return U[:, :rank], S[:rank], V.T[:rank]
