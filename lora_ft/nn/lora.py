"""LoRA: h = W x + s B A x (Hu et al. 2021, arXiv:2106.09685, section 4.1, equation 3).

W (out, in) is frozen, A (rank, in) and B (out, rank) train. B starts at zero, so the layer starts as its base; A starts
Kaiming-uniform, as in the paper's reference code. s is alpha / rank, or alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023,
arXiv:2312.03732). In plain PyTorch, with x: (tokens, in):

    h = F.linear(x, W, b) + s * F.linear(F.linear(dropout(x), A), B)

`LoRALinear` computes this with gradients written by hand (`_LoRA`), which keep less memory than autograd's. It also adapts
the *parts* of a fused projection (GPT-2's c_attn holds q, k and v): each part has its own A and B and changes only its own
rows of the output. A plain projection has one part that covers all rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import AdaptedLayer, out_in, place, with_weight
from lora_ft.nn.dropout import InputDropout
from lora_ft.nn.quantized import computing_dtype

ALL_ROWS = "all"  # the name of the part of a module that is adapted as one


class RowBlocks(NamedTuple):
    """Rows of an output: `length` rows from row `start` of each of `blocks` equal blocks of `width` rows.

    GPT-2's v is the last third of d + d + d rows: RowBlocks(1, 3 * d, 2 * d, d). GPT-NeoX's v is the last third of each
    head's rows: RowBlocks(heads, 3 * head_dim, 2 * head_dim, head_dim).
    """

    blocks: int
    width: int
    start: int
    length: int

    @classmethod
    def all(cls, out_features: int) -> "RowBlocks":
        """All rows of an output."""
        return cls(1, out_features, 0, out_features)

    @property
    def size(self) -> int:
        """The number of rows."""
        return self.blocks * self.length

    def of(self, y: Tensor) -> Tensor:
        """The view (..., blocks, length) of these rows in y (..., out)."""
        return y.unflatten(-1, (self.blocks, self.width)).narrow(-1, self.start, self.length)

    def flat(self, y: Tensor) -> Tensor:
        """These rows (..., size) of y (..., out): a view if they are one block, else a copy."""
        if self.blocks > 1:
            return self.of(y).flatten(-2)
        return y if self.length == self.width else y.narrow(-1, self.start, self.length)


class LoRALinear(AdaptedLayer):
    """A frozen layer with a trainable low-rank update.

    A and B are zero until `start`, or until a file's are copied into them.

    Attributes:
        rows: part -> the rows of the output that this part changes.
        lora_A: part -> A (rank, in), float32 whatever the base's dtype.
        lora_B: part -> B (rows of the part, rank), float32.
        scaling: s.
        dropout: applied to the input of A, or None.
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, scaling: float, rows: dict[str, RowBlocks] | None = None):
        super().__init__(base)
        self.rank, self.scaling = rank, scaling
        self.rows = rows or {ALL_ROWS: RowBlocks.all(self.out_features)}
        self.dropout: InputDropout | None = None
        zeros = dict(dtype=torch.float32, device=place(base)[1])
        # pairs, because ParameterDict sorts the keys of a dict
        self.lora_A = nn.ParameterDict((p, torch.zeros(rank, self.in_features, **zeros)) for p in self.rows)
        self.lora_B = nn.ParameterDict((p, torch.zeros(r.size, rank, **zeros)) for p, r in self.rows.items())

    def start(self, generator: torch.Generator | None = None) -> None:
        """Draw A as at the start of a training."""
        for A in self.lora_A.values():
            draw_(A, generator)

    @property
    def stored_rank(self) -> int:
        """The rank of the pairs, as they are stored."""
        return self.rank

    def pair(self, part: str) -> tuple[Tensor, Tensor]:
        """The two matrices whose product, times s, is added in the rows of a part; here A and B."""
        return self.lora_A[part], self.lora_B[part]

    def copy_pair(self, part: str, A: Tensor, B: Tensor) -> None:
        """Take the matrices of a part from its pair."""
        self.lora_A[part].copy_(A)
        self.lora_B[part].copy_(B)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> W x + b + s B A x (..., out), in the dtype of x (or of autocast)."""
        if not self.enabled:
            return self.base(x)
        mask = self.dropout.mask(x) if self.training and self.dropout is not None else None
        return add_updates(self, x, [self.update(mask)])

    def update(self, mask: Tensor | None = None, tokens: slice = slice(None)) -> "Update":
        """What this layer adds to `tokens`; mask: dropout's, in the shape of their inputs."""
        A, B = zip(*map(self.pair, self.rows), strict=True)
        s = self.scaling
        if mask is not None and self.dropout is not None:
            mask, s = mask.reshape(-1, self.in_features), s / (1 - self.dropout.p)
        return Update(tokens, s, tuple(self.rows.values()), mask, torch.cat(A) if len(A) > 1 else A[0], list(B))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s B A (out, in), float32; zero outside the parts' rows."""
        change = torch.zeros(self.out_features, self.in_features, device=place(self.base)[1])
        for part, rows in self.rows.items():
            A, B = self.pair(part)
            BA = self.scaling * (B.float() @ A.float())
            rows.of(change.T).copy_(BA.T.unflatten(-1, (rows.blocks, rows.length)))
        return change

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W + s B A (out, in), float32."""
        return out_in(self.base).float() + self.delta()

    def merged(self) -> nn.Linear | Conv1D:
        """A layer of the base's class with W + s B A, added in float32 and rounded once to the base's dtype."""
        weight = self.adapted_weight().to(place(self.base)[0])
        return with_weight(self.base, weight).train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, parts={list(self.rows)}"


class Update(NamedTuple):
    """What an adapter adds to the outputs of some tokens: s B A (m ∘ x).

    tokens: which. rows: of each part. mask: m (tokens, in), or None. A: (parts * rank, in). B: (rows, rank) of each part.
    """

    tokens: slice
    scaling: float
    rows: tuple[RowBlocks, ...]
    mask: Tensor | None
    A: Tensor
    B: list[Tensor]


def add_updates(layer: AdaptedLayer, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """x (..., in) -> W x + b and what each update adds (..., out), in the dtype of x (or of autocast).

    The tokens of the updates, counted over all leading dimensions of x, do not overlap.
    """
    dtype = computing_dtype(x)
    X = x.to(dtype).reshape(-1, layer.in_features)
    where = [u[:3] for u in updates]
    tensors = [t for u in updates for t in (u.mask, u.A.to(dtype), *(B.to(dtype) for B in u.B))]
    with torch.autocast(x.device.type, enabled=False):
        Y = _LoRA.apply(X, layer.base, where, *tensors)
    return Y.view(*x.shape[:-1], layer.out_features)


class _LoRA(torch.autograd.Function):
    """Y = X Wᵀ + b, then Y[:, rows_p] += s S_p B_pᵀ for each part p, with S = (m ∘ X) Aᵀ and m the dropout mask (or ones).

    With dY the gradient of Y, and dY_p its columns rows_p, the chain rule gives
        dS_p = s dY_p B_p            dB_p = s dY_pᵀ S_p
        dA   = dSᵀ (m ∘ X)
        dX   = dY W + m ∘ (dS A)
    so only X, m and the small S are kept, and Y and dX are accumulated in place. W and b, of the frozen `base`, get no
    gradient; W is read where it is used, since a quantized base dequantizes it each time. Each update has its own
    s, m, A and B, and its own tokens, whose rows of X, Y and S these are.

    X, m: (tokens, in), W: (out, in), b: (out,), A: (parts * rank, in), B_p: (rows_p, rank), S: (tokens, parts * rank).
    """

    @staticmethod
    def forward(ctx, X, base, where, *tensors):
        Y = F.linear(X, out_in(base).to(X.dtype), None if base.bias is None else base.bias.to(X.dtype))
        Ss = []
        for (tokens, s, rows), m, A, Bs in _each(where, tensors):
            X_u, Y_u = X[tokens], Y[tokens]
            S = (X_u if m is None else X_u * m).mm(A.t())
            for r, S_p, B in zip(rows, _split(S, len(rows)), Bs, strict=True):
                if r.blocks == 1:
                    r.flat(Y_u).addmm_(S_p, B.t(), alpha=s)
                else:
                    r.of(Y_u).add_((S_p @ B.T).unflatten(-1, (r.blocks, r.length)), alpha=s)
            Ss.append(S)
        ctx.save_for_backward(X, *Ss, *tensors)
        ctx.base, ctx.where = base, where
        return Y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dY):
        X, *saved = ctx.saved_tensors
        Ss, tensors = saved[: len(ctx.where)], saved[len(ctx.where) :]
        dX = dY @ out_in(ctx.base).to(dY.dtype) if ctx.needs_input_grad[0] else None
        gradients = []
        for ((tokens, s, rows), m, A, Bs), S in zip(_each(ctx.where, tensors), Ss, strict=True):
            X_u, dY_u, dSs, dBs = X[tokens], dY[tokens], [], []
            for r, S_p, B in zip(rows, _split(S, len(Bs)), Bs, strict=True):
                dY_p = r.flat(dY_u)
                dSs.append(dY_p.mm(B).mul_(s))
                dBs.append(dY_p.t().mm(S_p).mul_(s))
            dS = dSs[0] if len(dSs) == 1 else torch.cat(dSs, -1)
            dA = dS.t().mm(X_u if m is None else X_u * m)
            if dX is not None:
                dX_u = dX[tokens]
                dX_u.addmm_(dS, A) if m is None else dX_u.addcmul_(dS @ A, m.to(dX.dtype))
            gradients += [None, dA, *dBs]
        return dX, None, None, *gradients


def _split(S, parts):
    """The columns of each part; no call of torch if there is one part."""
    return (S,) if parts == 1 else S.chunk(parts, -1)


def _each(where, tensors):
    """(tokens, s, rows), m, A and the Bs of each update, from the flat list that autograd needs."""
    start = 0
    for update in where:
        m, A, *Bs = tensors[start : start + 2 + len(update[2])]
        start += 2 + len(Bs)
        yield update, m, A, Bs


@torch.no_grad()
def draw_(weight: Tensor, generator: torch.Generator | None) -> None:
    """Kaiming-uniform values, drawn on the CPU so that a seed gives the same ones on any device."""
    drawn = torch.empty(weight.shape, dtype=torch.float32, device="meta" if weight.is_meta else "cpu")
    weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
