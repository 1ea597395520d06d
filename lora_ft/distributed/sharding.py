"""A base too big for one device, sharded over the processes (FSDP2, torch's fully_shard).

Each process keeps a shard of every decoder layer; a layer is gathered to compute and freed afterwards. Modules outside the
layers (embedding, head, last norm) are replicated. The adapter is injected later, so its parameters are replicated too, and
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
    """Load `base` into the memory of rank 0 and distribute it, so that each process has its shards on `device`.

    Raises:
        ModelError: as `load_base`, or the model's class does not name its decoder layers.
    """
    full = load_base(base, dtype) if processes.is_main() else None
    weights = full.state_dict() if full else {}
    buffers = dict(full.named_buffers()) if full else {}
    dtypes, attention = processes.broadcast(lambda: _dtypes_and_attention(full))
    model = skeleton(base).eval()
    model.set_attn_implementation(attention)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes[name])
    model.requires_grad_(False)
    mesh = init_device_mesh(device, (processes.world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    model.to_empty(device=device)
    model.tie_weights()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    return model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: the modules that the model's class declares as not to be split.

    Raises:
        ModelError: it declares none.
    """
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ModelError(f"{model.config.model_type}: cannot be sharded (trainer.fsdp). Leave trainer.fsdp out.")
    return layers


def _dtypes_and_attention(model: PreTrainedModel | None) -> tuple[dict[str, torch.dtype], str]:
    assert model is not None, "called on rank 0 only"
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    return dtypes, model.config._attn_implementation
