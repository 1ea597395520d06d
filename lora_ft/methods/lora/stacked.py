"""The parts of a module as PEFT's one A and one B: A stacked, each B in the columns of its A and the rows of its part."""

from pathlib import Path

import torch
from torch import Tensor

from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.peft_config import PREFIX
from lora_ft.nn.lora import LoRALinear


def to_peft_matrices(layer: LoRALinear, R: int) -> tuple[Tensor, Tensor]:
    """One A (R, in) and one B (out, R), float32 on the CPU, whose product B A is exactly the sum of the parts' products."""
    A = torch.zeros(R, layer.in_features)
    B = torch.zeros(layer.out_features, R)
    for i, (part, rows) in enumerate(layer.rows.items()):
        span = slice(i * layer.stored_rank, (i + 1) * layer.stored_rank)
        A_part, B_part = (matrix.detach().float().cpu() for matrix in layer.pair(part))
        A[span] = A_part
        rows.of(B[:, span].T).copy_(B_part.T.unflatten(-1, (rows.blocks, rows.length)))
    return A, B


@torch.no_grad()
def from_peft_matrices(layer: LoRALinear, A: Tensor, B: Tensor, path: Path, module: str) -> None:
    """Copy A (R, in) and B (out, R) into the parts of a layer: the inverse of `to_peft_matrices`.

    ModelError, with `path` and `module`, if A or B has nonzero values outside the parts' blocks.
    """
    rest_A, rest_B = A.clone(), B.clone()
    for i, (part, rows) in enumerate(layer.rows.items()):
        span = slice(i * layer.stored_rank, (i + 1) * layer.stored_rank)
        layer.copy_pair(part, A[span], rows.of(B[:, span].T).flatten(-2).T)
        rest_A[span] = 0
        rows.of(rest_B[:, span].T).zero_()
    for letter, rest in (("A", rest_A), ("B", rest_B)):
        if rest.any():
            key = f"{PREFIX}{module}.lora_{letter}.weight"
            parts = f"rank {layer.stored_rank} of the parts {', '.join(layer.rows)}"
            raise ModelError(f"{path}: {key} holds more than {parts}. {undivided_hint(module)}")


def undivided_hint(module: str) -> str:
    """The way out where a file has a module as one, and a run in parts."""
    name = module.rpartition(".")[2]
    return f"If the adapter has {name} as one module, so must this run: adapter.targets: [], adapter.modules: [{name}]."
