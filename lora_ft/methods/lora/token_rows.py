"""Rows of the input embedding that are trained beside A and B (`adapter.train_tokens`, `add_tokens`).

In PEFT's files they are trainable_token_indices. A head that is tied to the embedding computes with the same rows, as in
PEFT, and stays tied when they are merged.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods.lora.multi import base_modules
from lora_ft.methods.lora.peft import WEIGHTS, AdapterFile
from lora_ft.methods.lora.peft_config import PREFIX, ROWS
from lora_ft.model.stored import is_finite
from lora_ft.nn.adapted import AdaptedModule
from lora_ft.nn.token_rows import TiedHeadRows, TokenRows


def token_ids(tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]) -> list[int]:
    """The ids of tokens, sorted: each text is an entry of the vocabulary, or becomes one token.

    Raises:
        ModelError: a text is more than one token, or none.
        ConfigError: there is no tokenizer.
    """
    ids: set[int] = set()
    if not texts:
        return []
    if tokenizer is None:
        raise ConfigError("adapter.train_tokens, adapter.add_tokens: a shape has no tokenizer. Leave them out.")
    for text in texts:
        token = tokenizer.convert_tokens_to_ids(text)
        found = [token] if tokenizer.convert_ids_to_tokens(token or 0) == text else None
        found = found or tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            parts = " ".join(map(repr, tokenizer.convert_ids_to_tokens(found)))
            problem = f"{text!r} is no token of the base's tokenizer (it is {parts or 'nothing'})"
            way_out = "Name tokens that it has, or add it as a new one: adapter.add_tokens"
            raise ModelError(f"adapter.train_tokens: {problem}. {way_out}.")
        ids.add(found[0])
    return sorted(ids)


def train_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Train the rows of these tokens in the input embedding, and so in the head if it is tied.

    Raises ModelError if the embedding or a tied head is trained or adapted already, or can't have trained rows.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    ends = {"embedding": (embedding, nn.Embedding)}
    if tied := head is not None and head.weight is embedding.weight:
        ends["tied head"] = (head, nn.Linear)
    for end, (module, kind) in ends.items():
        if isinstance(module, AdaptedModule):
            raise ModelError(f"adapter.train_tokens: the {end} is trained or adapted already: leave one of the two out")
        if not isinstance(module, kind):
            raise ModelError(f"adapter.train_tokens: the {end} of this model is {type(module).__name__}, without rows")
    if outside := [i for i in ids if not 0 <= i < embedding.num_embeddings]:
        raise ModelError(f"adapter.train_tokens: token {outside[0]}: the model has {embedding.num_embeddings} rows")
    paths = {module: path for path, module in model.named_modules()}
    rows = TokenRows(embedding, ids).train(embedding.training)
    model.set_submodule(paths[embedding], rows)
    if tied:
        model.set_submodule(paths[head], TiedHeadRows(head, rows).train(head.training))


def trained_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Path -> the embedding whose rows are trained, if one is."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TokenRows)}


def rows_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name in the file -> the trained rows (n, width), float32."""
    return {f"{PREFIX}{path}{ROWS}": module.trained.weight.detach() for path, module in trained_rows(model).items()}


def trainable_token_indices(model: nn.Module) -> list[int] | None:
    """PEFT's setting; None if no rows are trained."""
    return next((module.tokens for module in trained_rows(model).values()), None)


def check_rows(model: PreTrainedModel, adapter: AdapterFile) -> None:
    """Check that an adapter's rows are of the input embedding of `model`, which may be on meta. Raises ModelError."""
    if not adapter.rows:
        return
    path, key = adapter.folder / WEIGHTS, f"{PREFIX}{adapter.rows.module}{ROWS}"
    embedding: Any = model.get_input_embeddings()
    found = base_modules(model).get(adapter.rows.module)
    if found is None or found is not embedding:
        raise ModelError(f"{path}: {key}: only rows of the model's input embedding can be applied. Merge it with PEFT.")
    ids, shape = adapter.rows.ids, tuple(adapter.rows.tensor.shape)
    needed = (len(ids), embedding.weight.shape[1])
    if shape != needed or max(ids) >= embedding.weight.shape[0]:
        rows = f"and its {embedding.weight.shape[0]} rows up to {max(ids)}"
        raise ModelError(f"{path}: {key} has shape {shape}, the model needs {needed} {rows}. Merge it with PEFT.")
    head: Any = model.get_output_embeddings()
    ends = [embedding] + ([head] if head is not None and head.weight is embedding.weight else [])
    for module in (*adapter.stored, *(name.rpartition(".")[0] for name in adapter.whole)):
        if base_modules(model).get(module) in ends:
            raise ModelError(f"{path}: {key}: {module} is adapted too, which can't be applied. Merge it with PEFT.")


def rows_value(adapter: AdapterFile) -> Tensor:
    """An adapter's rows in float32. Raises ModelError for NaN or inf, or another type."""
    assert adapter.rows
    tensor, key = adapter.rows.tensor, f"{adapter.folder / WEIGHTS}: {PREFIX}{adapter.rows.module}{ROWS}"
    if not tensor.is_floating_point() or not is_finite(tensor):
        raise ModelError(f"{key} is of another type than floating-point, or contains NaN or inf.")
    return tensor.float()


def apply_rows(model: PreTrainedModel, adapter: AdapterFile, trainable: bool) -> None:
    """Put an adapter's rows, checked by `check_rows`, into `model`."""
    if adapter.rows:
        train_rows(model, sorted(adapter.rows.ids))
        copy_rows(model, adapter)
        model.get_submodule(adapter.rows.module).trained.requires_grad_(trainable)


@torch.no_grad()
def copy_rows(model: nn.Module, adapter: AdapterFile) -> None:
    """Copy an adapter's rows into those that `model` trains. Raises ModelError unless they are of the same tokens."""
    ours = {path: module.tokens for path, module in trained_rows(model).items()}
    theirs = {adapter.rows.module: sorted(adapter.rows.ids)} if adapter.rows else {}
    if ours != theirs:
        problem = f"has trained rows of tokens {theirs or 'none'}, this run trains {ours or 'none'}"
        raise ModelError(f"{adapter.folder / WEIGHTS}: {problem}. Make adapter.train_tokens the same.")
    for module in trained_rows(model).values():
        assert adapter.rows
        value = rows_value(adapter)[sorted(range(len(module.tokens)), key=adapter.rows.ids.__getitem__)]
        if value.shape != module.trained.weight.shape:
            shapes = f"{tuple(value.shape)}, the model needs {tuple(module.trained.weight.shape)}"
            raise ModelError(f"{adapter.folder / WEIGHTS}: the trained rows have shape {shapes}.")
        module.trained.weight.copy_(value)
