"""Intruder dimensions: strong directions of W + s B A that W does not have.

Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence" (arXiv:2410.21228): of the left singular
vectors of W + s B A with the largest singular values, those whose cosine to every one of W's is below a limit.

Imports no torch.
"""

import sys

import numpy as np
from tqdm import tqdm

from lora_ft.commands.inspect.adapter import Adapter
from lora_ft.commands.inspect.measures import Module
from lora_ft.commands.inspect.weights import Weight
from lora_ft.methods.lora.factors import Array, svd_of_matrix
from lora_ft.nn.expert_names import PATH

STRONGEST, LIMIT = 10, 0.5  # how many singular vectors are looked at, and the cosine below which one is an intruder


def count_intruders(adapter: Adapter, modules: list[Module], weights: dict[str, Weight]) -> None:
    """Set `intruders` of each module whose W is known; takes the singular vectors of every W."""
    known = [module for module in modules if module.name in weights]
    shapes = {m.name: (adapter.tensors[m.name][1].shape[0], adapter.tensors[m.name][0].shape[1]) for m in known}
    # GPT-2's W are stored as (in, out), which the square ones don't show, and GPT-OSS' experts
    transposed = {bool(PATH.fullmatch(name)) for name, shape in shapes.items() if weights[name].shape != shape}
    for module in tqdm(known, desc="intruders", unit="module", delay=2, disable=not sys.stderr.isatty()):
        A, B = adapter.tensors[module.name]
        W = weights[module.name].values()
        if W.shape != shapes[module.name] or (bool(PATH.fullmatch(module.name)) in transposed and len(W) == W.shape[1]):
            W = W.T
        module.intruders = intruders(W, adapter.scalings[module.name] * (B @ A))


def intruders(W: Array, change: Array) -> int:
    """The number of intruder dimensions among the STRONGEST left singular vectors of W + change; both (out, in)."""
    before = svd_of_matrix(W.astype(np.float64), min(W.shape)).U
    after = svd_of_matrix((W + change).astype(np.float64), min(STRONGEST, *W.shape)).U
    return int((np.abs(before.T @ after).max(axis=0) < LIMIT).sum())
