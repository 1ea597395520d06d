"""What an adapter does to each module: |s B A| against |W|, ranks, and how two adapters overlap. Imports no torch."""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from lora_ft.commands.inspect.adapter import Adapter, layer_and_role
from lora_ft.commands.inspect.weights import Weight
from lora_ft.core.messages import listed
from lora_ft.methods.lora.factors import cosines, effective_rank, rank_for_energy, singular_values, svd

NEAR_ZERO = 1e-4  # of the larger updates (their 90th percentile): a module below does nothing
FAR_ABOVE = 1.0  # of |W|: trained adapters change a weight by some percent
LARGE_SCALING = 64.0  # where |W| is not known


@dataclass
class Module:
    """Numbers of a module. norm: |s B A| in the Frobenius norm; base_norm: |W|, None if that is not known.

    rank: of the file. effective_rank: see `factors.effective_rank`. rank_99: what has 99% of the squared norm. share: of the
    squared norm of the whole adapter. intruders: see `intruders.py`; None if they were not counted.
    """

    name: str
    layer: int | None
    role: str
    rank: int
    effective_rank: float
    rank_99: int
    norm: float
    base_norm: float | None = None
    dead: bool = False
    share: float = 0.0
    intruders: int | None = None

    @property
    def ratio(self) -> float | None:
        """|s B A| / |W|."""
        return self.norm / self.base_norm if self.base_norm else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ratio": self.ratio}


def measure(adapter: Adapter, weights: dict[str, Weight]) -> list[Module]:
    """The numbers of each module that is whole; findings: dead modules, and changes far above W."""
    modules = []
    for name, (A, B) in adapter.tensors.items():
        S = singular_values(A, B)
        layer, role = layer_and_role(name)
        norm = abs(adapter.scalings[name]) * float(np.linalg.norm(S))
        rank, effective, most = len(A), effective_rank(S), rank_for_energy(S, 0.99)
        base_norm = weights[name].norm() if name in weights and weights[name].is_float else None
        modules.append(Module(name, layer, role, rank, effective, most, norm, base_norm))
    if not modules:
        return []
    limit = NEAR_ZERO * float(np.quantile([m.norm for m in modules], 0.9))
    total = sum(m.norm**2 for m in modules) or 1.0
    for m in modules:
        m.dead, m.share = m.norm <= limit, m.norm**2 / total
    if dead := [m.name for m in modules if m.dead]:
        text = f"{len(dead)} of {len(modules)} modules do nothing (B is zero or near it): {listed(dead, 3)}"
        adapter.find("dead", text)
    if far := [m for m in modules if (m.ratio or 0) > FAR_ABOVE]:
        worst = max(far, key=lambda m: m.ratio or 0)
        text = f"|s B A| is far above |W| in {len(far)} of {len(modules)} modules, {worst.ratio:,.3g} times in {worst.name}"
        adapter.find("exploded", f"{text} (s = {adapter.scalings[worst.name]:g}): is alpha right?")
    elif not any(m.ratio for m in modules) and (s := max(map(abs, adapter.scalings.values()))) > LARGE_SCALING:
        adapter.find("exploded", f"s is {s:g}, where 0.5 to 4 is usual: is alpha right?", False)
    return modules


@dataclass
class Overlap:
    """How the updates of two adapters to one module lie to each other.

    columns, rows: the mean squared cosine of the principal angles between the column spaces (of the B) and the row spaces (of
    the A): 1 if the smaller lies in the larger, 0 if they are orthogonal. chance: what random spaces of these ranks have.
    cosine: of the angle between the updates themselves, -1 to 1.
    """

    name: str
    layer: int | None
    role: str
    columns: float
    rows: float
    chance_columns: float
    chance_rows: float
    cosine: float


Entry = TypeVar("Entry", Module, Overlap)


def grouped(modules: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Title of a role -> its modules: the last part of its name if that is enough, `q` for `self_attn.q_proj`."""
    by_role: dict[str, list[Entry]] = {}
    for module in modules:
        by_role.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module.role), []).append(module)
    short = [role.removesuffix(".*").rpartition(".")[2].removesuffix("_proj") for role in by_role]
    titles = [name if short.count(name) == 1 else role for name, role in zip(short, by_role, strict=True)]
    return dict(zip(titles, by_role.values(), strict=True))


def together(modules: Iterable[Module]) -> float | None:
    """|s B A| / |W| of several modules as one; None if a |W| is not known, or there is none."""
    pairs = [(m.norm, m.base_norm) for m in modules]
    base = math.hypot(*(norm or math.nan for _, norm in pairs))
    return math.hypot(*(norm for norm, _ in pairs)) / base if base > 0 else None


def overlap(one: Adapter, other: Adapter) -> list[Overlap]:
    """The overlap in each module that both adapt, in the same shape."""
    found = []
    for name in [name for name in one.tensors if name in other.tensors]:
        a, b = svd(*one.tensors[name]), svd(*other.tensors[name])
        if (a.U.shape[0], a.V.shape[1]) != (b.U.shape[0], b.V.shape[1]):
            continue
        m, n = a.rank, b.rank
        small, large = min(m, n), max(m, n)
        columns, rows, cosine = 0.0, 0.0, 0.0
        if small:
            columns = float((cosines(a.U[:, :m], b.U[:, :n]) ** 2).sum()) / small
            rows = float((cosines(a.V[:m].T, b.V[:n].T) ** 2).sum()) / small
            inner = float((((a.U * a.S).T @ (b.U * b.S)) * (a.V @ b.V.T)).sum())
            sign = np.sign(one.scalings[name] * other.scalings[name])
            cosine = float(sign * inner / (np.linalg.norm(a.S) * np.linalg.norm(b.S)))
        out, width = a.U.shape[0], a.V.shape[1]
        found.append(Overlap(name, *layer_and_role(name), columns, rows, large / out, large / width, cosine))
    return found
