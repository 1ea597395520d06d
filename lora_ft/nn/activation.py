"""GELU's tanh form in one kernel.

transformers writes "gelu_new" and "gelu_fast" out as eight operations on the widest tensors of the model, four of them kept for
the backward. torch has the same function (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2) as one that keeps its input.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation


def fuse_gelu(model: PreTrainedModel) -> None:
    """Replace the model's written-out tanh GELUs in place; equal but for float32's rounding."""
    for path, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation | FastGELUActivation):
            model.set_submodule(path, nn.GELU(approximate="tanh"))
