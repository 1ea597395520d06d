"""The weighted sum of adapters' updates, sum_i w_i s_i B_i A_i, as one adapter; and the best approximation of a lower rank.

| way    | result |
|---|---|
| cat    | all factors beside each other: exact, the ranks add up |
| svd    | the best approximation of the sum at a rank, by singular values |
| linear | the same at the rank that all adapters have |
| ties   | of each update the largest entries, of these the mean of those with the elected sign (Yadav et al. 2023) |
| dare   | of each update random entries, scaled up by 1 / density (Yu et al. 2023) |

PEFT's `linear` sums A and B instead, which adds the products B_i A_j of different adapters: half of an adapter and half of the
same one is there twice the adapter. Its `ties` and `dare` on A and B do the same; here they are applied to the updates, as by
`ties_svd` and `dare_linear_svd`.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods.lora.factors import Array, rank_for_energy, svd, svd_of_matrix
from lora_ft.methods.lora.peft import AdapterFile
from lora_ft.methods.lora.portable import Factors


class Part(NamedTuple):
    """One of the adapters that are combined, and its weight."""

    adapter: AdapterFile
    weight: float


@dataclass(frozen=True)
class Settings:
    """rank: of the result; None for the largest of the adapters. energy: of the squared norm that is kept, instead of a rank.

    density: the share of the entries that ties and dare keep. seed: of those that dare draws.
    """

    how: str
    rank: int | None = None
    energy: float | None = None
    density: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Combined:
    """factors: module -> A and B, whose product is its update. errors: module -> |update - exact sum| / |exact sum|.

    error: the same for all modules as one.
    """

    factors: Factors
    errors: dict[str, float]
    error: float


class Summand(NamedTuple):
    """What an adapter adds to a module: weight * B A. B: with the scaling s."""

    A: Array
    B: Array
    weight: float


def combine(parts: Sequence[Part], settings: Settings) -> Combined:
    """Combine adapters of one base, of any ranks, scalings and modules.

    Raises:
        ConfigError: linear, of different ranks.
        ModelError: a module has different shapes in two adapters.
    """
    rank = settings.rank or max(A.shape[0] for part in parts for A, _ in part.adapter.tensors.values())
    if settings.how == "linear":
        _check_equal_ranks(parts)
    generator = np.random.default_rng(settings.seed)
    modules = list(dict.fromkeys(module for part in parts for module in part.adapter.tensors))
    factors, errors, wrong, total = {}, {}, 0.0, 0.0
    for module in tqdm(modules, desc="combine", unit="module", delay=2, disable=not sys.stderr.isatty()):
        summands = _summands(parts, module)
        exact = svd(*_beside_each_other(summands))
        norm = float(np.linalg.norm(exact.S))
        if settings.how == "cat":
            (A, B), error = _beside_each_other(summands), 0.0
        elif settings.how in ("ties", "dare"):
            ties = settings.how == "ties"
            update = _ties(summands, settings.density) if ties else _dare(summands, settings.density, generator)
            A, B = svd_of_matrix(update, rank).cut(rank)
            error = float(np.linalg.norm(B @ A - (exact.U * exact.S) @ exact.V)) / (norm or 1)
        else:
            kept = rank_for_energy(exact.S, settings.energy) if settings.energy else rank
            A, B = exact.cut(max(kept, 1))
            error = exact.error(max(kept, 1))
        factors[module] = (_tensor(A), _tensor(B))
        errors[module] = error
        wrong, total = wrong + (error * norm) ** 2, total + norm**2
    return Combined(factors, errors, math.sqrt(wrong / total) if total else 0.0)


def _tensor(matrix: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix, "float32"))


def _check_equal_ranks(parts: Sequence[Part]) -> None:
    ranks = {part.adapter.folder: {A.shape[0] for A, _ in part.adapter.tensors.values()} for part in parts}
    if len(set().union(*ranks.values())) > 1:
        shown = ", ".join(f"{folder} {'/'.join(map(str, sorted(of)))}" for folder, of in ranks.items())
        raise ConfigError(f"--how linear needs equal ranks, and they are: {shown}. Use --how svd or cat.")


def _summands(parts: Sequence[Part], module: str) -> list[Summand]:
    """What each adapter adds to a module, without the rows of A and columns of B that are zero."""
    summands: list[Summand] = []
    for part in parts:
        if module not in part.adapter.tensors:
            continue
        A, B = (matrix.numpy().astype(np.float64) for matrix in part.adapter.tensors[module])
        used = A.any(axis=1) & B.any(axis=0)
        used[0] |= not used.any()
        summand = Summand(A[used], part.adapter.scalings[module] * B[:, used], part.weight)
        if summands and (shapes := (B.shape[0], A.shape[1])) != (summands[0].B.shape[0], summands[0].A.shape[1]):
            first = (summands[0].B.shape[0], summands[0].A.shape[1])
            raise ModelError(
                f"{part.adapter.folder}: {module} is {shapes} here and {first} in another of the adapters."
            )
        summands.append(summand)
    return summands


def _beside_each_other(summands: Sequence[Summand]) -> tuple[Array, Array]:
    """A and B whose product is the exact sum."""
    return np.concatenate([of.A for of in summands]), np.concatenate([of.weight * of.B for of in summands], axis=1)


def _ties(summands: Sequence[Summand], density: float) -> Array:
    """Trim, elect a sign, merge (Yadav et al. 2023, section 3.2), with weights as in PEFT.

    A negative weight turns its update round before the election.
    """
    trimmed = []
    for of in summands:
        update = math.copysign(1, of.weight) * (of.B @ of.A)
        size = np.abs(update).ravel()
        count = max(1, int(density * size.size))
        keep = np.zeros(size.shape, dtype=bool)
        keep[np.argpartition(size, size.size - count)[size.size - count :]] = True
        trimmed.append(update * keep.reshape(update.shape))
    elected = np.where(sum(trimmed) >= 0, 1.0, -1.0)
    agrees = [np.sign(update) == elected for update in trimmed]
    merged = sum(abs(of.weight) * update * a for of, update, a in zip(summands, trimmed, agrees, strict=True))
    return np.asarray(merged / np.maximum(sum(a.astype(float) for a in agrees), 1))


def _dare(summands: Sequence[Summand], density: float, generator: np.random.Generator) -> Array:
    """Drop at random and rescale (Yu et al. 2023, section 3.2), then the sum: its expectation is the exact one."""
    kept = []
    for of in summands:
        update = of.weight * (of.B @ of.A)
        kept.append(update * (generator.random(update.shape) < density) / density)
    return np.asarray(sum(kept))
