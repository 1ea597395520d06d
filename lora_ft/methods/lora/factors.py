"""Singular values and vectors of B A from its thin factors, never from the product itself. NumPy in float64, no torch.

With B = Q R and Aᵀ = P T (QR decompositions), B A = Q (R Tᵀ) Pᵀ, and R Tᵀ is only rank x rank.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
EPS = 1e-7  # of the largest singular value: float32 factors hold nothing below


class SVD(NamedTuple):
    """U (out, rank), S (rank,) in descending order, V (rank, in): the product is U diag(S) V."""

    U: Array
    S: Array
    V: Array

    @property
    def rank(self) -> int:
        """The number of singular values that are not zero up to rounding."""
        limit = EPS * self.S.max(initial=0)
        return sum(value > limit for value in self.S)

    def cut(self, rank: int) -> tuple[Array, Array]:
        """A (rank, in) and B (out, rank) of the best approximation of this rank; each gets the root of the singular values."""
        root = np.sqrt(self.S[:rank])
        return root[:, None] * self.V[:rank], self.U[:, :rank] * root

    def error(self, rank: int) -> float:
        """|product - its best approximation| / |product|, in Frobenius norms; 0 for a product of 0."""
        total = float((self.S**2).sum())
        return float(np.sqrt((self.S[rank:] ** 2).sum() / total)) if total else 0.0


def svd(A: Array, B: Array) -> SVD:
    """The singular value decomposition of B A; A: (rank, in), B: (out, rank)."""
    Q, R = np.linalg.qr(B.astype(np.float64))
    P, T = np.linalg.qr(A.astype(np.float64).T)
    U, S, V = np.linalg.svd(R @ T.T)
    return SVD(Q @ U[:, : len(S)], S, V[: len(S)] @ P.T)


def singular_values(A: Array, B: Array) -> Array:
    """Those of B A alone, in half the time of `svd`."""
    R, T = (np.asarray(np.linalg.qr(thin.astype(np.float64), mode="r")) for thin in (B, A.T))
    return np.linalg.svd(R @ T.T, compute_uv=False)


def svd_of_matrix(D: Array, rank: int) -> SVD:
    """The `rank` largest singular values and vectors of a full matrix, by the eigenvectors of its smaller Gram matrix."""
    if D.shape[0] < D.shape[1]:
        U, S, V = svd_of_matrix(D.T, rank)
        return SVD(V.T, S, U.T)
    _, vectors = np.linalg.eigh(D.T @ D)
    V = vectors[:, ::-1][:, :rank].T
    US = D @ V.T
    S = np.linalg.norm(US, axis=0)
    return SVD(US / np.where(S > 0, S, 1), S, V)


def effective_rank(S: Array) -> float:
    """exp(entropy of S / sum(S)) (Roy & Vetterli 2007): r for r equal singular values, 1 if one outweighs all; 0 for zeros."""
    total = S.sum()
    if not total:
        return 0.0
    p = S[S > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def rank_for_energy(S: Array, energy: float) -> int:
    """The smallest rank whose singular values have this share of the sum of squares; 0 for zeros."""
    squares = np.cumsum(S**2)
    return int(np.searchsorted(squares, energy * squares[-1] * (1 - 1e-12)) + 1) if squares[-1] else 0


def cosines(X: Array, Y: Array) -> Array:
    """The cosines of the principal angles between the spaces of orthonormal columns X and Y, in descending order."""
    return np.clip(np.linalg.svd(X.T @ Y, compute_uv=False), 0, 1)
