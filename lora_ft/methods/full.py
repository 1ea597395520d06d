"""Full fine-tuning: every weight trains, and a complete model folder is saved (see methods/interface.py).

Weights are trained and saved in float32 whatever the base's dtype: a lower precision would lose an optimizer's small steps.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lora_ft.config.schema import AdapterConfig
from lora_ft.core import storage
from lora_ft.core.errors import ModelError, is_out_of_memory
from lora_ft.core.messages import first_line
from lora_ft.core.paths import temporary_folder
from lora_ft.methods.tensor_files import copy_tensors
from lora_ft.methods.trained import Saved, Trained
from lora_ft.model.files import SINGLE
from lora_ft.model.small_files import forget_paths

# The base's weights of each model that `load` changed, in the order of its parameters
_base_weights: WeakKeyDictionary[PreTrainedModel, list[Tensor]] = WeakKeyDictionary()


def inject(model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Let every weight train, in float32."""
    model.float().requires_grad_(True)
    return "every weight"


def save(model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase) -> Saved:
    """Write the files that `save_pretrained` would, each one atomically; weights on the CPU are written without a copy."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in ignored}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    storage.write_tensors(folder / SINGLE, {name: tensor.cpu().contiguous() for name, tensor in state.items()})
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = "float32", [type(model).__name__]
    names = [SINGLE]
    with temporary_folder() as drafts:
        config.save_pretrained(drafts)
        if model.can_generate():
            model.generation_config.save_pretrained(drafts)
        tokenizer.save_pretrained(drafts)
        forget_paths(Path(drafts))
        for draft in sorted(path for path in Path(drafts).rglob("*") if path.is_file()):
            name = draft.relative_to(drafts)
            (folder / name).parent.mkdir(exist_ok=True)
            storage.write_file(folder / name, draft.read_bytes())
            names.append(name.as_posix())
    return names, {}


def load(model: PreTrainedModel, trained: Trained) -> None:
    """Copy the trained weights into the base, and keep the base's own for `base_weights`."""
    model.float()
    base = [parameter.detach().clone() for parameter in model.parameters()]
    load_into(model, trained)
    _base_weights[model] = base


@contextmanager
def base_weights(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model that `load` changed has its base's weights. The tensors are exchanged, not copied."""

    def exchange() -> None:
        if base := _base_weights.get(model):
            for parameter, value in zip(model.parameters(), base, strict=True):
                parameter.data, value.data = value.data, parameter.data

    exchange()
    try:
        yield
    finally:
        exchange()


def load_into(model: PreTrainedModel, trained: Trained) -> None:
    """Copy the trained weights into `model`."""
    folder = trained.folder
    try:
        saved, info = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=torch.float32, output_loading_info=True
        )
    except Exception as e:  # transformers and safetensors have many classes
        if is_out_of_memory(e):
            raise
        raise ModelError(f"{folder / SINGLE}: can't be loaded into this base: {first_line(e)}") from e
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ModelError(f"{folder / SINGLE}: its tensors are not those of this base. Is it of another model?")
    copy_tensors(folder / SINGLE, dict(model.named_parameters()), dict(saved.named_parameters()))
