"""Bottleneck adapters on the output of attention and MLP in every layer (see methods/interface.py).

The roles `o` and `down` are the last projections of these sublayers in every family. The adapter follows them, before the
output is added to the residual stream: both of them (Houlsby et al. 2019, arXiv:1902.00751, figure 2), or `down` alone
(Pfeiffer et al. 2021, arXiv:2005.00247).
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_ft.config.schema import AdapterConfig
from lora_ft.core.errors import ModelError
from lora_ft.methods import tensor_files
from lora_ft.methods.lora.files import CONFIG, WEIGHTS
from lora_ft.methods.lora.inject import trainable
from lora_ft.methods.lora.targets import find_targets
from lora_ft.methods.trained import Saved, Trained
from lora_ft.nn.adapted import dimensions
from lora_ft.nn.bottleneck import NONLINEARITIES, Bottleneck

PLACES = {"houlsby": ("o", "down"), "pfeiffer": ("down",)}


def inject(model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Add a bottleneck behind each projection of `settings.placement`; `seed` determines D."""
    paths = find_targets(model, PLACES[settings.placement], (), settings.layers)
    insert(model, dict.fromkeys(paths, settings.bottleneck_size), settings.nonlinearity, seed)
    return f"{len(paths)} adapter layers"


def insert(model: nn.Module, sizes: dict[str, int], nonlinearity: str, seed: int = 0) -> None:
    """Freeze `model` and put a bottleneck behind each of these modules. sizes: path -> bottleneck size."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for path, size in sizes.items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | Conv1D)
        model.set_submodule(path, Bottleneck(base, size, nonlinearity, generator).train(base.training))


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """Path -> bottleneck, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Bottleneck)}


def save(model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase) -> Saved:
    """Write the bottlenecks' tensors, and a config with their size and nonlinearity."""
    first = next(iter(bottlenecks(model).values()))
    config = {"method": "bottleneck", "bottleneck_size": first.down.out_features, "nonlinearity": first.nonlinearity}
    return tensor_files.write(folder, base_name, trainable(model), config), {}


def load(model: PreTrainedModel, trained: Trained) -> None:
    """Put the trained bottlenecks on the base."""
    tensors, path = tensor_files.read(trained), trained.folder / WEIGHTS
    sizes = {name.removesuffix(".down.weight"): len(D) for name, D in tensors.items() if name.endswith(".down.weight")}
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if unknown := sorted(sizes.keys() - linear.keys()):
        raise ModelError(f"{path}: {unknown[0]} is not a linear layer of this model. Is it of another model?")
    for module, size in sizes.items():  # before layers of these sizes are made
        shape, width = tuple(tensors[f"{module}.down.weight"].shape), dimensions(linear[module])[1]
        if shape != (size, width):
            raise ModelError(f"{path}: {module}.down.weight has shape {shape}, the model needs (n, {width}).")
    insert(model, sizes, nonlinearity_of(trained))
    tensor_files.copy_tensors(path, trainable(model), tensors)


def load_into(model: PreTrainedModel, trained: Trained) -> None:
    """Copy the trained bottlenecks into those of `model`, which must have the same modules, sizes and nonlinearity."""
    tensors = tensor_files.read(trained)
    ours = next(iter(bottlenecks(model).values())).nonlinearity
    if (theirs := nonlinearity_of(trained)) != ours:
        raise ModelError(f"{trained.folder / CONFIG}: its nonlinearity is {theirs}, this run's is {ours}.")
    tensor_files.copy_tensors(trained.folder / WEIGHTS, trainable(model), tensors)


def nonlinearity_of(trained: Trained) -> str:
    """The nonlinearity in a bottleneck's config; ModelError if it is missing or unknown."""
    nonlinearity = trained.adapter_config.get("nonlinearity")
    if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
        raise ModelError(f"{trained.folder / CONFIG}: nonlinearity must be one of {', '.join(NONLINEARITIES)}.")
    return nonlinearity
