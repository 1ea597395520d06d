"""DoRA: A and B turn the rows of W, and their lengths m are trained apart (Liu et al. 2024, arXiv:2402.09353, equation 5).

    h = m (W + s B A) / |W + s B A| x + b

with the norm of each row. (The paper writes W as (in, out), so there it is a column's.) m starts as |W|, so the layer starts as
its base. As in section 4.3, the gradient takes the norm for a constant. A row outside the adapted parts of a fused projection
keeps its length.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import place
from lora_ft.nn.lora import LoRALinear, RowBlocks


class DoRALinear(LoRALinear):
    """A LoRA layer whose rows have trained lengths.

    Attributes:
        magnitude: part -> m (rows of the part,), float32; zero until `start`, or until a file's are copied into it.
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, scaling: float, rows: dict[str, RowBlocks] | None = None):
        super().__init__(base, rank, scaling, rows)
        zeros = {p: torch.zeros(r.size, dtype=torch.float32, device=place(base)[1]) for p, r in self.rows.items()}
        self.magnitude = nn.ParameterDict(zeros.items())
        self._kept: tuple[object, Tensor] | None = None  # what `gain` was computed from, and the gain

    def start(self, generator: torch.Generator | None = None) -> None:
        """Draw A, and take the base's lengths."""
        super().start(generator)
        self.keep_lengths()

    @torch.no_grad()
    def keep_lengths(self) -> None:
        """Make m the norms of W + s B A, so that the layer computes what LoRA computes."""
        norms = self.norms()
        for part, rows in self.rows.items():
            self.magnitude[part].copy_(rows.of(norms).flatten())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> m / |W + s B A| (W + s B A) x + b (..., out), in the dtype of x (or of autocast)."""
        y = super().forward(x)
        return self.stretched(y) if self.enabled else y

    def stretched(self, y: Tensor) -> Tensor:
        """LoRA's outputs (W + s B A) x + b (..., out) with this layer's lengths; in float32, since the gain is nearly 1."""
        gain = self.gain()
        return (y * gain if self.bias is None else y * gain + self.bias * (1 - gain)).to(y.dtype)

    def gain(self) -> Tensor:
        """m / |W + s B A| (out,), float32; 1 outside the parts. In eval mode without gradients it is computed once."""
        if self.training or torch.is_grad_enabled():
            return self._gain()
        state = [(p._version, p.device) for p in self.parameters()]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self._gain()
        return self._kept[1]

    def train(self, mode: bool = True) -> "DoRALinear":
        """Set the mode. What was computed in eval mode is forgotten: a fused optimizer changes no version of its parameters."""
        self._kept = None
        return super().train(mode)

    def _gain(self) -> Tensor:
        norms = self.norms()
        gain = torch.ones_like(norms)
        for part, rows in self.rows.items():
            lengths = self.magnitude[part].unflatten(0, (rows.blocks, rows.length))
            rows.of(gain).copy_(lengths / rows.of(norms))
        return gain

    @torch.no_grad()
    def norms(self) -> Tensor:
        """|W + s B A| (out,) of each row, float32."""
        return super().adapted_weight().norm(dim=1)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """m of all rows (out,), as PEFT stores them: outside the parts the base's own."""
        lengths = self.norms()
        for part, rows in self.rows.items():
            rows.of(lengths).copy_(self.magnitude[part].unflatten(0, (rows.blocks, rows.length)))
        return lengths

    @torch.no_grad()
    def copy_lengths(self, lengths: Tensor) -> None:
        """Take m from those of all rows (out,)."""
        for part, rows in self.rows.items():
            self.magnitude[part].copy_(rows.of(lengths).flatten())

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """m (W + s B A) / |W + s B A| (out, in), float32."""
        return self.gain()[:, None] * super().adapted_weight()
