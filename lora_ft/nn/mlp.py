"""Two changes to a model's MLPs that save memory and time; what the model computes stays the same.

- `fuse_gelu`: the tanh GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2) in one kernel, which keeps only its input.
  transformers writes "gelu_new" and "gelu_fast" as eight operations on the model's widest tensors and keeps four of them.
- `keep_gate_and_up`: the gated MLP down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202) keeps only gate(x) and up(x).
  Autograd also keeps act(gate(x)), and a trained `down` keeps its input: a fifth to a third of a step's memory. Both are
  elementwise products of the other two, cheap to compute again.
"""

import re
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

ACTIVATIONS = (SiLUActivation, nn.SiLU, GELUActivation, GELUTanh, nn.GELU)
GATED = re.compile(r"(\w+)\(mul\((\w+)\((\w+)\(x\)\), (\w+)\(x\)\)\)")  # down, act, gate, up


def fuse_gelu(model: PreTrainedModel) -> None:
    """Replace the tanh GELUs of `model` by torch's, in place; equal except for float32 rounding."""
    for path, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation | FastGELUActivation):
            model.set_submodule(path, nn.GELU(approximate="tanh"))


def keep_gate_and_up(model: nn.Module) -> int:
    """Make the gated MLPs of `model` keep only gate(x) and up(x), in place. Returns the number of MLPs changed.

    Gradient checkpointing keeps neither, and needs no such change.
    """
    mlps = [(mlp, names) for mlp in model.modules() if (names := _gated(mlp))]
    for mlp, names in mlps:
        mlp.forward = partial(_forward, mlp, *names)
    return len(mlps)


def _gated(mlp: nn.Module) -> tuple[str, ...] | None:
    """The names of `mlp`'s down, act, gate and up if its forward, traced whatever its class is, is that of a gated MLP."""
    parts = list(mlp.children())
    replaced = "forward" in vars(mlp)  # by this module or another library
    if replaced or len(parts) != 4 or not any(isinstance(part, ACTIVATIONS) for part in parts):
        return None
    try:
        *_, output = _Shallow().trace(mlp).nodes
    except Exception:  # a forward that can't be traced, for example one that branches on values
        return None
    match = GATED.fullmatch(_expression(output.args[0]))
    return match.groups() if match and isinstance(mlp.get_submodule(match[2]), ACTIVATIONS) else None


class _Shallow(fx.Tracer):
    """Traces a forward without entering its submodules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _expression(node: object) -> str:
    """A traced value as text, such as "down_proj(mul(act_fn(gate_proj(x)), up_proj(x)))"."""
    if not isinstance(node, fx.Node) or node.kwargs:
        return "?"
    if node.op == "placeholder":
        return "x"
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return f"{name}({', '.join(map(_expression, node.args))})"


def _forward(mlp: nn.Module, *names_and_x) -> Tensor:
    """x (..., in) -> down(act(gate(x)) * up(x)) (..., in). names_and_x: the names of down, act, gate and up, and x."""
    *names, x = names_and_x
    down, act, gate, up = map(mlp.get_submodule, names)
    G, U = gate(x), up(x)
    H = _Product.apply(G, U, act)
    if not H.requires_grad:
        return down(H)
    G, U, storage = G.detach(), U.detach(), _storage(H)

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if _storage(saved) == storage and saved.is_contiguous() else saved

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else act(G).mul_(U).view(kept)

    with saved_tensors_hooks(pack, unpack):  # `down` keeps the shape of its input H, which is computed again
        return down(H)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Product(torch.autograd.Function):
    """H = act(G) * U, elementwise. With dH the gradient of H: dU = dH * act(G), dG = act'(G) * dH * U."""

    @staticmethod
    def forward(ctx, G, U, act):
        ctx.save_for_backward(G, U)
        ctx.act = act
        return act(G).mul_(U)  # in place: one tensor of this size less, whose hole the heap would keep

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dH):
        G, U = ctx.saved_tensors
        with torch.enable_grad():
            G = G.detach().requires_grad_()
            S = ctx.act(G)
        (dG,) = torch.autograd.grad(S, G, dH * U)
        return dG, dH * S.detach(), None
