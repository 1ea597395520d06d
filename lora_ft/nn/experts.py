"""A mixture of experts whose weights are parameters of three dimensions, as linear layers that can be adapted one by one.

transformers stores a projection of all experts in one parameter: (experts, out, in), or for GPT-OSS (experts, in, out) with a
bias. Here every expert gets linear layers whose weights are views of it, so that nothing is copied.
"""

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_ft.nn.expert_names import PARAMETERS
from lora_ft.nn.lora import RowBlocks


class UnpackedExperts(nn.Module):
    """Experts as linear layers; computes what `experts` computes.

    gate_up_proj (or up_proj, without a gate), down_proj: the layers of each expert.
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = copy.copy(experts)  # which has the activation function
        self.experts._parameters = {}
        for name in PARAMETERS:
            if (weight := experts._parameters.get(name)) is not None:
                bias = experts._parameters.get(f"{name}_bias")
                weights = weight.mT if experts.is_transposed else weight
                layers = zip(weights, [None] * len(weight) if bias is None else bias, strict=True)
                self.add_module(name, nn.ModuleList(linear(W, b) for W, b in layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden) -> the weighted sum of the chosen experts' outputs (tokens, hidden).

        top_k_index, top_k_weights: (tokens, k), which experts a token has, and their weights.
        """
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        tokens = order // top_k_index.shape[-1]
        first = self.gate_up_proj if self.experts.has_gate else self.up_proj
        activation = self.experts._apply_gate if self.experts.has_gate else self.experts.act_fn
        counts = _counts(chosen, len(first))
        outputs = [
            self.down_proj[expert](activation(first[expert](x)))
            for expert, x in enumerate(hidden_states[tokens].split(counts))
            if len(x)
        ]
        weighted = torch.cat(outputs) * top_k_weights.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, tokens, weighted.to(hidden_states.dtype))

    def rows(self) -> dict[str, tuple[str, RowBlocks]]:
        """Role -> the parameter that holds it, and the rows of an expert's outputs."""
        down = {"down": ("down_proj", RowBlocks.all(self.down_proj[0].out_features))}
        if not self.experts.has_gate:
            return down | {"up": ("up_proj", RowBlocks.all(self.up_proj[0].out_features))}
        size = self.gate_up_proj[0].out_features
        if self.experts.is_concatenated:
            gate, up = (RowBlocks(1, size, start, size // 2) for start in (0, size // 2))
        else:  # gate, up, gate, up, ...
            gate, up = (RowBlocks(size // 2, 2, start, 1) for start in (0, 1))
        return down | {"gate": ("gate_up_proj", gate), "up": ("gate_up_proj", up)}


def linear(W: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer over a weight (out, in), which may be a view."""
    with torch.device("meta"):
        layer = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(W, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a mixture of experts that can be unpacked, and is not yet."""
    known = ("has_gate", "is_transposed", "is_concatenated")
    return (
        all(hasattr(module, name) for name in known)
        and getattr(module._parameters.get("down_proj"), "ndim", 0) == 3
        and not getattr(module, "has_post_expert_norm", False)
    )


def _counts(chosen: Tensor, experts: int) -> list[int]:
    """How many tokens each expert has; without values, to count memory, all have as many."""
    if isinstance(chosen, FakeTensor):
        least, more = divmod(len(chosen), experts)
        return [least + (expert < more) for expert in range(experts)]
    return chosen.bincount(minlength=experts).tolist()
