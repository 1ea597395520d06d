"""Whether a model fits its tokenizer and the data."""

import torch
from transformers import PreTrainedModel

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import info
from lora_ft.model.files import Base
from lora_ft.model.generate import position_limit


def check_vocabulary(model: PreTrainedModel, base: Base, largest_id: int) -> None:
    """Raise ModelError unless the model has an embedding for every token id in the data."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(
            f"model {base.name}: its tokenizer produces id {largest_id}, but the model has only {rows} embeddings: they do "
            "not belong together. Restore the tokenizer's files."
        )


def check_length(model: PreTrainedModel, base: Base, longest: int) -> None:
    """Raise ConfigError if the model's table of positions (GPT-2, OPT, GPT-J) ends before the longest example, in tokens.

    Where positions are computed (RoPE), going beyond what the base was trained for is only a note.
    """
    known = position_limit(model)
    if known is None or longest <= known:
        return
    of_tokens = set(model.get_input_embeddings().modules())
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m not in of_tokens)
    has_table = any(m.num_embeddings - known in (0, 1, 2) for m in tables)  # OPT's table has two extra rows
    has_table = has_table or any(name.endswith("embed_positions") for name, _ in model.named_buffers())
    message = f"data.max_length: the longest example has {longest:,} tokens but model {base.name} supports {known:,} positions"
    if has_table:
        raise ConfigError(f"{message}. Set data.max_length to {known} at most.")
    info(f"note: {message}. It works, but the base was not trained on them; data.max_length: {known} would cut there.")
