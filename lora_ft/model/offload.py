"""A large model whose blocks' weights stay in its files, by transformers and accelerate."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_ft.model.files import Base
from lora_ft.model.load import load_base, skeleton

LARGE = 2**32  # bytes of a model in float32


@contextmanager
def loaded_in_float32(base: Base) -> Iterator[PreTrainedModel]:
    """A model in eval mode on the CPU; where it is large, each layer of its blocks reads its weights when it computes.

    Raises ModelError as `load_base`.
    """
    model = skeleton(base)
    if base.gguf or base.pickles or 4 * model.num_parameters() <= LARGE:
        yield load_base(base, "float32")
        return
    with tempfile.TemporaryDirectory(dir=base.folder, prefix=".offloaded-") as scratch:  # for converted weights
        yield (
            type(model)
            .from_pretrained(base.folder, dtype=torch.float32, device_map=placed(model), offload_folder=Path(scratch))
            .eval()
        )


def placed(model: nn.Module) -> dict[str, str]:
    """Where transformers leaves each module: "disk" for the lists of blocks, "cpu" for what is outside of all."""
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    places: dict[str, str] = {}

    def place(path: str, module: nn.Module) -> None:
        if path in lists or not any(own.startswith(f"{path}.") for own in lists):
            places[path] = "disk" if path in lists else "cpu"
            return
        places.update({f"{path}.{name}": "cpu" for name, _ in module.named_parameters(recurse=False)})
        for name, child in module.named_children():
            place(f"{path}.{name}", child)

    for name, child in model.named_children():
        place(name, child)
    return places
