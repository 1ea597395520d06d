"""The scaling s of s B A. Imports no torch."""

import math


def scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """s = alpha / rank, or alpha / sqrt(rank) with `rslora`."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank
