"""Tokens that a run adds to its base (`adapter.add_tokens`): in the tokenizer, the embedding and the head.

A new token's rows start as the mean of the rows before them, as in transformers; a base whose embedding has rows to spare keeps
its size.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.core.errors import ModelError


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Add tokens. Raises ModelError if the tokenizer has one of them already."""
    vocabulary = tokenizer.get_vocab() if texts else {}
    if known := [text for text in texts if text in vocabulary]:
        problem = f"{known[0]!r} is a token of the base's tokenizer already"
        raise ModelError(f"adapter.add_tokens: {problem}. Name it in adapter.train_tokens instead.")
    if texts:
        tokenizer.add_tokens([*texts])


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """The ids of added tokens, sorted."""
    return sorted(set(tokenizer.convert_tokens_to_ids([*texts])))


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Give a model, which may be on meta, the rows of the tokens that were added to its tokenizer."""
    ids = ids_of(tokenizer, texts)
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    if model.device.type != "meta":
        for name in names(model):
            parameter = model.get_parameter(name)
            parameter.data = with_rows(parameter.data, ids)


def names(model: PreTrainedModel) -> list[str]:
    """The names of the parameters that have a row for each token; a tied one is named once."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    of_ends = {id(p) for end in ends if end is not None for p in end.parameters(recurse=False)}
    return [name for name, p in model.named_parameters() if id(p) in of_ends]


def with_rows(W: Tensor, ids: Sequence[int]) -> Tensor:
    """W (rows, ...) with the rows `ids`, which may be beyond it, as the mean of those before the first."""
    result = W.new_empty(max(len(W), max(ids) + 1), *W.shape[1:])
    result[: len(W)] = W
    result[[*ids]] = W[: min(ids)].mean(0, dtype=torch.float32).to(W.dtype)
    return result


@dataclass(frozen=True)
class NewRows:
    """The rows of new tokens in a base's files. names: of the tensors there that get them."""

    ids: Sequence[int] = ()
    names: Collection[str] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, stored: Mapping[str, str], ids: Sequence[int]) -> "NewRows":
        """stored: name in `model` -> name in the files; a tied tensor is there under one or both of its names."""
        tied = model.all_tied_weights_keys
        ends = {*names(model)}
        ends |= {name for name, source in tied.items() if source in ends or name in ends}
        return cls(ids, {stored[name] for name in ends if name in stored})

    def shape(self, name: str, stored: Sequence[int]) -> list[int]:
        """The shape of the tensor of this name with the new rows."""
        rows, *width = stored or [0]
        return [max(rows, max(self.ids) + 1), *width] if self.ids and name in self.names else [*stored]

    def added(self, name: str, W: Tensor) -> Tensor:
        """The tensor of this name with the new rows, or as it is."""
        return with_rows(W, self.ids) if self.ids and name in self.names else W
