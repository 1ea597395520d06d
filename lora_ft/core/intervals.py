"""95% intervals: of a proportion, of a mean, of the difference of two proportions of the same rows. Imports no torch."""

import math
from collections.abc import Sequence
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
# Student's t at 97.5% for 1, 2, ... degrees of freedom, from a table; beyond it an expansion is as exact
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student_t(freedom: int) -> float:
    """Student's t at 97.5%, within 0.001 for any degrees of freedom (Abramowitz and Stegun 1964, 26.7.5)."""
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    terms = Z, (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return sum(term / freedom**i for i, term in enumerate(terms))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): within [0, 1] even for small n and extreme proportions."""
    share = successes / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe_interval(both: int, only_second: int, only_first: int, neither: int) -> tuple[float, float]:
    """Of the second proportion minus the first, both of the same rows (Newcombe 1998, Stat. Med. 17:2635, method 10).

    The arguments count the rows in which both, one or none succeeded. It holds for few rows and extreme proportions, where
    a bootstrap has nothing to draw from: 20 rows of 20 mended are not a gain of exactly 100 points.
    """
    n, first, second = both + only_second + only_first + neither, both + only_first, both + only_second
    difference = (second - first) / n
    (low1, high1), (low2, high2) = wilson_interval(first, n), wilson_interval(second, n)
    p1, p2 = first / n, second / n
    product = 1.0 * both * neither - only_second * only_first
    if product > 0:
        product = max(product - n / 2, 0)  # a correction for continuity, as in the paper
    margins = first * (n - first) * second * (n - second)
    phi = product / math.sqrt(margins) if margins else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return difference - distance(p2 - low2, high1 - p1), difference + distance(high2 - p2, p1 - low1)


def difference_interval(a: float, a_ends: Sequence[float], b: float, b_ends: Sequence[float]) -> tuple[float, float]:
    """Of a - b from an interval of each (MOVER: Zou and Donner 2008, Stat. Med. 27:1693).

    It is exact enough for independent estimates, and too wide for those of the same rows, which vary together.
    """
    return a - b - math.hypot(a - a_ends[0], b_ends[1] - b), a - b + math.hypot(a_ends[1] - a, b - b_ends[0])


def mcnemar_p(better: int, worse: int) -> float:
    """The exact two-sided p-value of McNemar's test: of so uneven a split if a changed row is better or worse by chance."""
    n, k = better + worse, min(better, worse)
    term, tail = 0.0, 0.0  # log of C(n, i) / 2^n, and the sum up to i = k
    for i in range(k + 1):
        term = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        tail += math.exp(term)
    return min(1.0, 2 * tail)
