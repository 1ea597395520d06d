"""The two files of a small method: its tensors and what they mean.

`bottleneck` has no format of its own elsewhere: adapter_config.json names it under `method`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.files import CONFIG, WEIGHTS, portable_name
from lora_ft.methods.lora.peft import differences
from lora_ft.methods.trained import Trained


def write(folder: Path, base_name: str, tensors: Mapping[str, Tensor], config: dict) -> list[str]:
    """Write the two files, the tensors as they are but on the CPU; the names of the files."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_tensors(folder / WEIGHTS, on_cpu)
    storage.write_json(folder / CONFIG, {"base_model_name_or_path": portable_name(base_name)} | config)
    return [WEIGHTS, CONFIG]


def read(trained: Trained) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors, float32.

    Raises:
        ModelError: a file is missing, damaged, or changed since its manifest; or a tensor is of no float, or not finite.
    """
    config, path = trained.adapter_config, trained.folder / WEIGHTS
    tensors = storage.read_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not all(torch.isfinite(v) for v in torch.aminmax(tensor)):
            raise ModelError(f"{path}: {name} holds no finite floats ({tensor.dtype}).")
    return config, {name: tensor.float() for name, tensor in tensors.items()}


@torch.no_grad()
def fill(path: Path, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        ModelError: names or shapes differ (nothing was copied then).
    """
    if parameters.keys() != tensors.keys():
        raise ModelError(
            differences(path, parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys())
            + " Is it of another model, or of other settings?"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(parameter.shape)}."
            )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
