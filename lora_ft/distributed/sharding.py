"""A base that no device holds whole (FSDP2: torch's fully_shard): each process keeps its share of every decoder layer.

Each layer is gathered when it computes and let go after. What lies outside the layers (embedding, head, last norm) is whole on
every process. The adapter is injected after this, so that nothing here knows of it: its parameters are whole everywhere, and
only they are trained and saved.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lora_ft.core.errors import ModelError
from lora_ft.distributed import processes
from lora_ft.model.files import Base
from lora_ft.model.load import load_base, skeleton


def load_sharded(base: Base, dtype: str, device: str) -> PreTrainedModel:
    """Load `base` once, on the main process and in its memory, and leave each process with its shares on `device`.

    Raises:
        ModelError: as `load_base`, or the model doesn't say which modules are its layers.
    """
    whole = load_base(base, dtype) if processes.is_main() else None
    weights = whole.state_dict() if whole else {}
    buffers = dict(whole.named_buffers()) if whole else {}
    dtypes, attention = processes.broadcast(lambda: _kinds(whole))
    model = skeleton(base).eval()
    model.set_attn_implementation(attention)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes[name])
    model.requires_grad_(False)
    mesh = init_device_mesh(device, (processes.world_size(),))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    model.to_empty(device=device)
    model.tie_weights()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    return model


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, which the model's class names as what must not be split."""
    found = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not found:
        raise ModelError(f"{model.config.model_type}: names no layers to shard (trainer.fsdp). Leave trainer.fsdp out.")
    return found


def _kinds(model: PreTrainedModel | None) -> tuple[dict[str, torch.dtype], str]:
    assert model is not None, "asked on the main process alone"
    kinds = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    return kinds, model.config._attn_implementation
