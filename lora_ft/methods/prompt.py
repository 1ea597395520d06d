"""Prompt tuning: n virtual tokens in front of every example, in PEFT's files (see methods/interface.py).

Lester et al. 2021, arXiv:2104.08691; peft 0.21, PROMPT_TUNING.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import AdapterConfig
from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods import tensor_files
from lora_ft.methods.lora.files import WEIGHTS
from lora_ft.methods.trained import Saved, Trained
from lora_ft.nn.virtual_tokens import VirtualTokens

KEY = "prompt_embeddings"


def inject(model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Add virtual tokens that start as embeddings: of `init_text`, repeated or cut to fit, or of ids drawn by `seed`."""
    n, embedding = settings.virtual_tokens, model.get_input_embeddings()
    if settings.init_text is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(embedding.num_embeddings, (n,), generator=generator, device="cpu")
    else:
        text = tokenizer(settings.init_text, add_special_tokens=False)["input_ids"]
        if not text:
            raise ConfigError("adapter.init_text: the tokenizer turns it into no tokens; set a text, or null")
        ids = torch.tensor([text[i % len(text)] for i in range(n)], device="cpu")
    with torch.no_grad():
        insert(model, embedding(ids.to(embedding.weight.device)))
    return f"{n} virtual tokens"


def insert(model: PreTrainedModel, start: Tensor) -> None:
    """Freeze `model` and add virtual tokens. start: (n, width), their vectors."""
    model.requires_grad_(False)
    model.set_input_embeddings(VirtualTokens(model.get_input_embeddings(), start))


def save(model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase) -> Saved:
    """Write the virtual tokens' vectors (n, width), and PEFT's config."""
    prompt, config = model.get_input_embeddings().prompt, model.config.get_text_config()
    peft_config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "inference_mode": True,
    }
    return tensor_files.write(folder, base_name, {KEY: prompt}, peft_config), {}


def load(model: PreTrainedModel, trained: Trained) -> None:
    """Add the trained virtual tokens; inputs without their ids (`virtual_ids`) are computed by the bare base."""
    prompt, width = read(trained), model.get_input_embeddings().weight.shape[1]
    if prompt.shape[1] != width:
        shape = tuple(prompt.shape)
        raise ModelError(f"{trained.folder / WEIGHTS}: {KEY} has shape {shape}, the model needs (n, {width}).")
    tensor_files.refuse_not_finite(trained.folder / WEIGHTS, {KEY: prompt})
    insert(model, prompt.float().to(model.device))


def load_into(model: PreTrainedModel, trained: Trained) -> None:
    """Copy the trained vectors into the virtual tokens of `model`."""
    ours = {KEY: model.get_input_embeddings().prompt}
    tensor_files.copy_tensors(trained.folder / WEIGHTS, ours, {KEY: read(trained)})


def read(trained: Trained) -> Tensor:
    """The trained vectors (n, width), not read yet, of lora-ft's or PEFT's files; ModelError if not prompt tuning's."""
    tensors, n = tensor_files.read(trained), trained.adapter_config.get("num_virtual_tokens")
    prompt = tensors.get(KEY)
    if prompt is None or len(tensors) > 1 or prompt.dim() != 2 or len(prompt) != n:
        raise ModelError(f"{trained.folder / WEIGHTS}: must have {KEY} alone, one row for each of num_virtual_tokens.")
    return prompt


def virtual_ids(model: PreTrainedModel) -> list[int]:
    """The ids of the model's virtual tokens; empty if it has none."""
    embedding = model.get_input_embeddings()
    return embedding.ids if isinstance(embedding, VirtualTokens) else []
