"""A whole step of every method on a device that is not the CPU, with tensors that have no values: no hardware is needed.

The device is one that Python code registers, as the CPU build of torch computes no gradients on a GPU's. Tensors of two
devices in one operation, and a value read from the device in the step (`item`, `tolist`, `nonzero`), are errors here.
"""

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from transformers import AutoConfig

from lora_ft.config.schema import AdapterConfig
from lora_ft.data.batches import UNSHARDED, micro_batch
from lora_ft.methods.interface import METHODS, virtual_ids
from lora_ft.methods.lora.inject import trainable
from lora_ft.model.load import build
from lora_ft.nn.attention import Isolation
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.training.step import add_gradients
from tests.helpers.families import COMMON, FAMILIES
from tests.helpers.tiny import python
from tests.methods.test_methods import SETTINGS, TOKENIZER

ROOT = Path(__file__).parents[2]
LORA = {
    kind: AdapterConfig(rank=2, targets=["all"], dropout=0.1, **settings)
    for kind, settings in {"lora": {}, "dora": {"dora": True}, "pissa": {"init": "pissa"}}.items()
}
# gemma2: soft-capping and windows; gpt_neox: fused slices; gptj, bloom: the mask of a row
CASES = [(method, family) for method in METHODS for family in ("llama", "gpt2")] + [
    *(("lora", family) for family in ("gemma2", "gpt_neox", "gptj", "bloom")),
    *((kind, "gpt2") for kind in ("dora", "pissa")),
]


class Gpu(backend_registration._DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def test_steps_stay_on_their_device():
    """In a process of its own: torch counts the devices at its first backward."""
    python(f"from {__name__} import steps; steps()", ROOT)


def steps() -> None:
    backend_registration._setup_privateuseone_for_python_backend("gpu", Gpu())
    for method, family in CASES:
        try:
            one_step(method, family)
        except Exception as error:
            error.add_note(f"{method} on {family}")
            raise


def one_step(method: str, family: str) -> None:
    model_type, settings = FAMILIES[family]
    isolation = Isolation.ATTENTION if family not in ("gptj", "bloom") else Isolation.MASK
    examples = [{"input_ids": [*range(10, 30), i], "labels": [*range(10, 30), i]} for i in range(3)]
    model = build(AutoConfig.for_model(model_type, **COMMON | settings), "meta")
    METHODS["lora" if method in LORA else method].inject(model, LORA.get(method) or SETTINGS[method], 0, TOKENIZER)
    prefix = virtual_ids(model)
    examples = [{"input_ids": prefix + e["input_ids"], "labels": [-100] * len(prefix) + e["labels"]} for e in examples]
    micro = micro_batch(examples, share=family != "bloom")
    step = {"micro": [micro], "total": len(micro["keep"]), "rows": [], "tokens": 0}
    with FakeTensorMode() as mode:
        micro |= {key: mode.from_tensor(x) for key, x in micro.items() if isinstance(x, torch.Tensor)}
        to_device(model)
        parameters = list(trainable(model).values())
        optimizer = torch.optim.AdamW(parameters, fused=False)
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            else:
                keep_gate_and_up(model)
            model.train()
            loss = add_gradients(model, isolation, step, UNSHARDED, lambda: None)
            optimizer.step()
        assert {loss.device.type, *(p.grad.device.type for p in parameters)} == {"gpu"}


def to_device(model: torch.nn.Module) -> None:
    """Replace the meta tensors of `model`; weights that are tied stay tied."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None and id(x) not in moved:
                    new = torch.empty(x.shape, dtype=x.dtype, device="gpu")
                    moved[id(x)] = torch.nn.Parameter(new, x.requires_grad) if tensors is module._parameters else new
                tensors[name] = None if x is None else moved[id(x)]
