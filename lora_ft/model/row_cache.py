"""Keys and values of a batch whose rows join and leave at any token.

Rows are aligned at their last token, as transformers' `generate` pads them: row i fills the last `lengths[i]` places, those
before are masked. Every layer keeps all tokens, so that a window is a matter of the mask alone.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lora_ft.model.generate import position_limit
from lora_ft.nn.adapted import eval_mode
from lora_ft.nn.attention import frequencies_follow_length

ROOM = 64  # tokens for which a layer has room in advance
FIRST, SECOND = (
    (3, 5, 7, 4, 6),
    (9, 4, 8, 3, 7, 5, 6, 4, 5),
)  # two prompts of different lengths, to compare with each alone


class RoomyLayer(DynamicLayer):
    """A DynamicLayer that writes new tokens in place, where transformers' copies all tokens for each new one."""

    def __init__(self, **_: Any):
        super().__init__()
        self._buffers: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of (rows, heads, new tokens, size); return all."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for i, (own, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
            end, buffer = start + new.shape[2], self._buffers[i]
            if buffer is None or end > buffer.shape[2]:
                buffer = new.new_empty(*new.shape[:2], end + ROOM, new.shape[3])
                if start:
                    buffer[:, :, :start] = own
                self._buffers[i] = buffer
            buffer[:, :, start:end] = new
        self._show(start + key_states.shape[2])
        return self.keys, self.values

    def fill(self, buffers: list[Tensor], tokens: int) -> None:
        """Take over keys and values, of which the first `tokens` are there."""
        self.device, self.is_initialized, self._buffers = buffers[0].device, True, [*buffers]
        self._show(tokens)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers if buffer is not None)


class RowCache(DynamicCache):
    """A cache of RoomyLayers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one row."""
        return sum(x[0, :, 0].numel() * x.element_size() for layer in self.layers for x in (layer.keys, layer.values))

    def beginning(self, tokens: int) -> "RowCache":
        """A cache that begins with the first tokens of this one; it copies them before it writes."""
        cache = RowCache()
        for layer in self.layers:
            own = RoomyLayer()
            own.fill([layer.keys[:, :, :tokens], layer.values[:, :, :tokens]], tokens)
            cache.layers.append(own)
        return cache


class Part(NamedTuple):
    """A row to copy: of which cache, the row there, and how many tokens it has."""

    cache: RowCache
    row: int
    length: int


def read_together(forward: "Forward", prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[RowCache]]:
    """Read whole prompts in one pass: the logits (prompts, vocabulary) after each, and a cache for each."""
    width, cache = max(map(len, prompts)), RowCache()
    padding = [width - len(ids) for ids in prompts]
    padded = torch.tensor([[0] * none + [*ids] for none, ids in zip(padding, prompts, strict=True)])
    logits = forward(padded, cache, [0] * len(prompts), padding=padding)[:, -1]
    return logits, [joined([Part(cache, row, len(ids))]) for row, ids in enumerate(prompts)]


def joined(parts: Sequence[Part]) -> RowCache:
    """A new cache with these rows."""
    cache, tokens = RowCache(), max(part.length for part in parts)
    for i, like in enumerate(parts[0].cache.layers):
        buffers = []
        for name in ("keys", "values"):
            _, heads, _, size = getattr(like, name).shape
            buffer = getattr(like, name).new_zeros(len(parts), heads, tokens + ROOM, size)
            for row, part in enumerate(parts):
                theirs = getattr(part.cache.layers[i], name)[part.row]
                buffer[row, :, tokens - part.length : tokens] = theirs[:, theirs.shape[1] - part.length :]
            buffers.append(buffer)
        layer = RoomyLayer()
        layer.fill(buffers, tokens)
        cache.layers.append(layer)
    return cache


class Forward:
    """A model's forward pass over new tokens of rows whose earlier tokens are in a cache."""

    def __init__(self, model: PreTrainedModel):
        self.model, takes = model, inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
        self.positions, self.last_only = "position_ids" in takes, "logits_to_keep" in takes

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        cache: DynamicCache,
        lengths: Sequence[int],
        *,
        every: bool = False,
        padding: Sequence[int] | None = None,
    ) -> Tensor:
        """The logits (rows, tokens, vocabulary) after each of the new tokens if `every`, else after the last alone.

        ids: (rows, new tokens). lengths: how many tokens of each row are in the cache. padding: how many of the new tokens are
        none, at the beginning of rows of which nothing is in the cache.
        """
        device = self.model.device
        before, new = torch.tensor(lengths, device=device), ids.shape[1]
        if padding is not None:
            before = before - torch.tensor(padding, device=device)
        longest = max(lengths) + new
        mask = torch.arange(longest, device=device) >= longest - new - before[:, None]  # (rows, tokens in the row)
        inputs: dict[str, Any] = {self.cache_name: cache, "attention_mask": mask.long(), "use_cache": True}
        if self.positions:
            inputs["position_ids"] = (before[:, None] + torch.arange(new, device=device)).clamp(min=0)
        if self.last_only:
            inputs["logits_to_keep"] = 0 if every else 1
        with eval_mode(self.model):
            logits = self.model(ids.to(device), **inputs).logits
        return logits if every else logits[:, -1:]


@torch.no_grad()
def rows_can_join(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths in one RowCache get the logits of each alone, found by computing with the model.

    Not so for recurrent states, and where frequencies follow the longest row.
    """
    if frequencies_follow_length(model, position_limit(model) or 0):
        return False
    forward = Forward(model)
    try:
        alone = [model(torch.tensor([ids], device=model.device)).logits[0, -1] for ids in (FIRST, SECOND)]
        parts = []
        for ids in (FIRST, SECOND):
            cache = RowCache()
            forward(torch.tensor([ids[:2]]), cache, [0])
            forward(torch.tensor([ids[2:-1]]), cache, [2])
            parts.append(Part(cache, 0, len(ids) - 1))
        together = joined(parts)
        last = torch.tensor([[FIRST[-1]], [SECOND[-1]]])
        logits = forward(last, together, [part.length for part in parts])[:, 0]
        at_once, _ = read_together(forward, (FIRST, SECOND))
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
        return False
    plain = all(type(layer) is RoomyLayer and layer.is_initialized for layer in together.layers)
    limit = 0.05 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-3
    expected = torch.stack(alone)
    difference = max((found - expected).abs().max() for found in (logits, at_once))
    return plain and bool(difference <= limit * expected.abs().max())
