"""Adapter layers: a bottleneck after the attention's and the MLP's last projection of every layer.

The roles `o` and `down` are these projections in every family, so that the adapter stands where the papers have it: on a
sublayer's output, before it is added to the residual stream.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_ft.config.schema import AdapterConfig
from lora_ft.core.errors import ModelError
from lora_ft.methods import tensor_files
from lora_ft.methods.lora.files import WEIGHTS
from lora_ft.methods.lora.inject import disabled, find_targets
from lora_ft.methods.trained import Trained
from lora_ft.nn.bottleneck import NONLINEARITIES, Bottleneck
from lora_ft.nn.lora import dimensions

PLACES = {"houlsby": ("o", "down"), "pfeiffer": ("down",)}


def inject(model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> str:
    found = [target.module for target in find_targets(model, PLACES[settings.placement], (), settings.layers)]
    insert(model, dict.fromkeys(found, settings.bottleneck_size), settings.nonlinearity)
    generator = torch.Generator().manual_seed(seed)
    for layer in bottlenecks(model).values():
        layer.start(generator)
    return f"{len(found)} adapter layers"


def insert(model: nn.Module, sizes: dict[str, int], nonlinearity: str) -> None:
    """Freeze `model` and put a bottleneck of that size behind each of these modules."""
    model.requires_grad_(False)
    for path, size in sizes.items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | Conv1D)
        layer = Bottleneck(base, dimensions(base)[1], size, nonlinearity, base.weight.device)
        model.set_submodule(path, layer.train(base.training))


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Bottleneck)}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """ "path.down.weight" and so on: the adapters' own, in model order."""
    return {
        f"{path}.{name}": parameter
        for path, layer in bottlenecks(model).items()
        for name, parameter in layer.named_parameters()
        if not name.startswith("base.")
    }


def save(
    model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], dict]:
    some = next(iter(bottlenecks(model).values()))
    config = {"method": "bottleneck", "bottleneck_size": some.down.out_features, "nonlinearity": some.nonlinearity}
    return tensor_files.write(folder, base_name, parameters(model), config), {}


def load(model: PreTrainedModel, trained: Trained) -> None:
    folder, (config, tensors) = trained.folder, tensor_files.read(trained)
    sizes = {name.removesuffix(".down.weight"): len(D) for name, D in tensors.items() if name.endswith(".down.weight")}
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if strange := sorted(sizes.keys() - linear):
        raise ModelError(f"{folder / WEIGHTS}: {strange[0]} is no linear layer of this model. Is it of another model?")
    insert(model, sizes, nonlinearity_of(folder, config))
    tensor_files.fill(folder / WEIGHTS, parameters(model), tensors)


def load_into(model: PreTrainedModel, trained: Trained) -> None:
    folder, (config, tensors) = trained.folder, tensor_files.read(trained)
    ours = next(iter(bottlenecks(model).values())).nonlinearity
    if (theirs := nonlinearity_of(folder, config)) != ours:
        raise ModelError(f"{folder / tensor_files.CONFIG}: its nonlinearity is {theirs}, this run's is {ours}.")
    tensor_files.fill(folder / WEIGHTS, parameters(model), tensors)


def nonlinearity_of(folder: Path, config: dict) -> str:
    if config.get("nonlinearity") not in NONLINEARITIES:
        raise ModelError(f"{folder / tensor_files.CONFIG}: nonlinearity is none of {', '.join(NONLINEARITIES)}.")
    return config["nonlinearity"]


def bare(model: nn.Module) -> AbstractContextManager[None]:
    """Within it the model computes its bare base."""
    return disabled(bottlenecks(model).values())
