"""The two files of the methods bottleneck and prompt: adapter_model.safetensors and adapter_config.json.

PEFT defines those of prompt. No other library has a format for bottleneck: its config has `method: bottleneck`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.files import CONFIG, WEIGHTS
from lora_ft.methods.lora.peft import differences
from lora_ft.methods.trained import Trained
from lora_ft.model.stored import is_finite


def write(folder: Path, base_name: str, tensors: Mapping[str, Tensor], config: dict) -> list[str]:
    """Write the two files, the tensors in their own dtypes. Returns the names of the files."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_tensors(folder / WEIGHTS, on_cpu)
    storage.write_json(folder / CONFIG, {"base_model_name_or_path": os.path.expanduser(base_name)} | config)
    return [WEIGHTS, CONFIG]


def read(trained: Trained) -> dict[str, Tensor]:
    """Name -> tensor, whose values are not read yet; ModelError if the file is damaged, or one not floating-point."""
    path, tensors = trained.folder / WEIGHTS, storage.read_tensors(trained.folder / WEIGHTS)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{path}: {name} ({tensor.dtype}) is not floating-point.")
    return tensors


def refuse_not_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError if a tensor contains NaN or inf. It reads all values, so shapes are compared before."""
    for name, tensor in tensors.items():
        if not is_finite(tensor.float()):
            raise ModelError(f"{path}: {name} contains NaN or inf.")


@torch.no_grad()
def copy_tensors(path: Path, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, read from `path`, into the parameters of the same names; ModelError, before any, if they don't match."""
    if parameters.keys() != tensors.keys():
        lists = differences(path, parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys())
        raise ModelError(f"{lists} Is it of another model, or of other settings?")
    for name, parameter in parameters.items():
        shape, needed = tuple(tensors[name].shape), tuple(parameter.shape)
        if shape != needed:
            raise ModelError(f"{path}: {name} has shape {shape}, the model needs {needed}.")
    refuse_not_finite(path, tensors)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
