"""Bias terms only (BitFit: Ben Zaken et al. 2021, arXiv:2106.10199): every bias of the base trains, nothing else does.

They train in float32; a base of a lower precision computes with them rounded to its own.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.adapter.files import WEIGHTS
from lora_ft.adapter_settings import AdapterConfig
from lora_ft.errors import ModelError
from lora_ft.methods import files
from lora_ft.methods.switch import Bare, exchanged


class InDtype(nn.Module):
    """A float32 parameter as a layer of another dtype computes with it."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter.to(self.dtype)


def inject(model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{free_biases(model)} bias vectors"


def free_biases(model: PreTrainedModel) -> int:
    """Freeze all but the biases, of norms too; how many there are.

    Raises:
        ModelError: the architecture has none.
    """
    names = [name for name, _ in model.named_parameters() if is_bias(name)]
    if not names:
        raise ModelError(
            f"adapter.method: {model.config.model_type} has no bias terms here, so `bias` would train nothing. Take "
            "another method: lora, bottleneck, prompt or full."
        )
    model.requires_grad_(False)
    for name in names:
        path, _, leaf = name.rpartition(".")
        module, parameter = model.get_submodule(path), model.get_parameter(name)
        dtype, parameter.data = parameter.dtype, parameter.data.float()
        parametrize.register_parametrization(module, leaf, InDtype(dtype), unsafe=True)  # unsafe: the dtype may change
        parameter.requires_grad_(True)
    return len(names)


def is_bias(name: str) -> bool:
    """Experts' biases are named `gate_up_proj_bias` and the like."""
    return name.rpartition(".")[2].endswith("bias")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The biases by their names in the base, in float32."""
    return {
        name.replace(".parametrizations.", ".").removesuffix(".original"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".original")
    }


def save(
    model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], dict]:
    return files.write(folder, base_name, parameters(model), {"method": "bias"}), {}


def load(model: PreTrainedModel, folder: Path) -> Bare:
    free_biases(model)
    biases = list(parameters(model).values())
    base = [bias.detach().clone() for bias in biases]
    restore(model, folder)
    return lambda: exchanged(biases, base)


def restore(model: PreTrainedModel, folder: Path) -> None:
    files.fill(folder / WEIGHTS, parameters(model), files.read(folder)[1])
