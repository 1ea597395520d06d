"""A base too big for one device, sharded over the processes (FSDP2, torch's fully_shard).

Each process keeps a shard of every decoder layer; a layer is gathered to compute and freed afterwards. Modules outside the
layers (embedding, head, last norm) are replicated. The adapter is injected later, so its parameters are replicated too, and
only they are trained and saved.
"""

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lora_ft.core.errors import ModelError
from lora_ft.distributed import processes
from lora_ft.model.files import Base
from lora_ft.model.load import load_base, skeleton


def load_sharded(base: Base, dtype: str, device: str, quantization: object = None) -> PreTrainedModel:
    """Load `base` into the memory of rank 0 and distribute it, so that each process has its shards on `device`.

    quantization: not supported; the rules of the config refuse it.

    Raises:
        ModelError: as `load_base`, or the model's class does not name its decoder layers.
    """
    model = skeleton(base).eval()
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ModelError(f"{model.config.model_type}: cannot be sharded (trainer.fsdp). Leave trainer.fsdp out.")
    full = load_base(base, dtype) if processes.is_main() else model  # read on rank 0 only
    dtypes = processes.broadcast(lambda: {n: p.dtype for n, p in full.named_parameters(remove_duplicate=False)})
    model.set_attn_implementation(processes.broadcast(lambda: full.config._attn_implementation))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes[name])
    model.requires_grad_(False)
    mesh = init_device_mesh(device, (processes.world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    model.to_empty(device=device)
    model.tie_weights()
    weights = full.state_dict() if processes.is_main() else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():
        if processes.is_main():
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, src=0)
    return model
