"""Several runs in one flat row: W x is computed once for all tokens, and each run adds its own s B A x to its own tokens.

The layers of a joint model hold the LoRA layers of all runs; `parts_of_row`, which must include the backward, says which tokens
of a row are whose. One backward then gives every A and B its own gradient: no other run's tokens reach it.

What is random in training, dropout, is drawn for each run from its own generator, as in a run alone.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lora_ft.nn.adapted import AdaptedLayer
from lora_ft.nn.dora import DoRALinear
from lora_ft.nn.lora import LoRALinear, add_updates


def draw_nothing(what: Hashable) -> AbstractContextManager[None]:
    """The `drawing` of a part in which nothing is random."""
    return nullcontext()


class Part(NamedTuple):
    """The tokens of a row that belong to a run.

    drawing: makes a context in which torch draws from the run's generator; called with what draws, so that gradient
    checkpointing, which computes a layer again, draws the same again.
    """

    run: int
    tokens: slice
    drawing: Callable[[Hashable], AbstractContextManager[None]] = draw_nothing


_parts: Sequence[Part] = ()  # of the current row; a global: models pass no such argument down


@contextmanager
def parts_of_row(parts: Sequence[Part]) -> Iterator[None]:
    """Within it the joint model computes a row of these parts."""
    global _parts
    _parts = parts
    try:
        yield
    finally:
        _parts = ()


def drawing_at(token: int, what: Hashable) -> AbstractContextManager[None]:
    """The context in which the run of a token of the current row draws; of no effect in a run alone."""
    for part in _parts:
        if part.tokens.start <= token < part.tokens.stop:
            return part.drawing(what)
    return nullcontext()


class JointLoRALinear(AdaptedLayer):
    """A frozen layer and the LoRA layers that runs train on it.

    runs: run -> its LoRALinear; runs that don't adapt this layer are absent. `base` is the only submodule: the runs' own models
    hold their layers.
    """

    def __init__(self, base: nn.Linear | Conv1D, runs: dict[int, LoRALinear]):
        super().__init__(base)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        """x (1, tokens, in) -> (1, tokens, out), each run's update, and DoRA's lengths, in the tokens of its part."""
        updates = []
        for run, tokens, drawing in _parts:
            if layer := self.runs.get(run):
                mask = None
                if self.training and layer.dropout is not None:
                    with drawing(layer.dropout):
                        mask = layer.dropout.mask(x, tokens)
                updates.append(layer.update(mask, tokens))
        y = add_updates(self, x, updates) if updates else self.base(x)
        if not any(isinstance(self.runs.get(part.run), DoRALinear) for part in _parts):
            return y
        layers = [(self.runs.get(run), y[..., tokens, :]) for run, tokens, _ in _parts]
        return torch.cat([layer.stretched(own) if isinstance(layer, DoRALinear) else own for layer, own in layers], -2)


class BaseDropout(TorchFunctionMode):
    """Draws the dropout of a base's own layers for each part of a row, within `parts_of_row`. It slows every call of torch.

    calls: how many dropouts were drawn in the current row, or the last one.
    """

    calls = 0

    def __enter__(self):
        self.calls = 0
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.dropout or not kwargs.get("training", True) or not kwargs.get("p", 0.5):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.pop("input")
        if x[..., 0].numel() != _parts[-1].tokens.stop:
            raise NotImplementedError("dropout of the model's own over something else than tokens")
        self.calls += 1
        dropped = []
        for part in _parts:
            with part.drawing(self.calls):
                dropped.append(func(x[..., part.tokens, :], *args[1:], **kwargs))
        return torch.cat(dropped, -2)
