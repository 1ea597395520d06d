"""A large model whose blocks' weights stay in its files, where each layer reads its own when it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from lora_ft.model.files import Base
from lora_ft.model.load import load_base, load_model_config, skeleton
from lora_ft.model.quantize import Quantization, forget
from lora_ft.model.stored import stored_weights

LARGE = 2**32  # bytes of a model in float32


@contextmanager
def loaded_in_float32(base: Base) -> Iterator[PreTrainedModel]:
    """A model in eval mode on the CPU; where it is large, the linear layers of its blocks read their weights as they compute.

    Raises ModelError as `load_base`.
    """
    empty = skeleton(base)
    if base.gguf or base.pickles or 4 * empty.num_parameters() <= LARGE:
        yield load_base(base, "float32")
        return
    with stored_weights(base, one_by_one=True) as weights:
        settings = Quantization(None, weights)
        how = {"config": load_model_config(base), "state_dict": weights, "quantization_config": settings}
        model = type(empty).from_pretrained(None, dtype=torch.float32, **how)
        forget(model, settings)
        yield model.eval()
