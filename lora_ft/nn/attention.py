"""Attention within each example of a flat row.

A micro-batch is one row (1, tokens): several examples one after the other, without padding, positions restarting at each. In
many families positions alone do not keep the examples apart. There are three ways to do so, best first:

- ATTENTION: `packed_attention`, registered in transformers' AttentionInterface. An example costs its length squared.
- MASK: the model's attention over the row with a block-diagonal mask, for families that have their own attention code (BLOOM,
  Falcon, GPT-J, GPT-Neo, ...). A row costs its length squared.
- ONE_PER_ROW: one example per row, for RoPE whose frequencies depend on the longest position in the row.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import and_masks, eager_mask, packed_sequence_mask_function, sdpa_mask

from lora_ft.nn.adapted import eval_mode

try:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer
except ImportError:
    varlen_attn = None

NAME = "lora_ft_packed"
_lengths: list[int] | None = None  # of the examples in the current row; a global: models pass no such argument down


class Isolation(Enum):
    """How the examples of a row are kept apart in a model (see the module's docstring)."""

    ATTENTION = "attention"
    MASK = "mask"
    ONE_PER_ROW = "one per row"

    @classmethod
    def detect(cls, model: PreTrainedModel, longest: int) -> "Isolation":
        """The best way that isolates examples of up to `longest` tokens, found by computing with the loaded model."""
        if not _frequencies_follow_length(model, longest):
            for way in (cls.ATTENTION, cls.MASK):
                if (way is cls.MASK or model._supports_attention_backend) and isolates(model, way):
                    return way
        return cls.ONE_PER_ROW

    @classmethod
    def guess_from_config(cls, model: PreTrainedModel, longest: int) -> "Isolation":
        """The way that `detect` will most likely find, from the config: for a model without weights."""
        if _frequencies_follow_length(model, longest):
            return cls.ONE_PER_ROW
        # BLOOM accepts any attention implementation by name, but never calls it
        calls_interface = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
        return cls.ATTENTION if model._supports_attention_backend and calls_interface else cls.MASK

    @contextmanager
    def row(self, model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
        """Within it `model` computes one row of examples of these lengths (in tokens). It must include the backward."""
        global _lengths
        default = model.config._attn_implementation
        if self is Isolation.ATTENTION:
            model.config._attn_implementation = NAME
        _lengths = list(lengths)
        try:
            yield
        finally:
            _lengths = None
            model.config._attn_implementation = default


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, kv_heads, tokens, head_dim)
    value: Tensor,  # (1, kv_heads, tokens, head_dim)
    attention_mask: Tensor | None,  # ignored
    scaling: float | None = None,  # factor of the scores; None is head_dim ** -0.5
    dropout: float = 0.0,
    sliding_window: int | None = None,  # query i attends to key j where 0 <= i - j < window
    softcap: float | None = None,  # c: scores become c tanh(scores / c) (Gemma 2, arXiv:2408.00118, section 2)
    s_aux: Tensor | None = None,  # (heads,) sinks: one more score per head in the softmax, without a value (GPT-OSS)
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each example of the row: (1, tokens, heads, head_dim), and None for the weights."""
    assert _lengths is not None and sum(_lengths) == query.shape[2], "packed_attention outside of Isolation.row"
    dropout = dropout if module.training else 0.0
    plain = softcap is None and s_aux is None
    if plain and not dropout and varlen_attn and _flash_supports(query, key, value):
        return _attention_in_one_call(query, key, value, _lengths, scaling, sliding_window), None
    # (kv_heads, group, tokens, head_dim): a group of query heads reads one key head, which is expanded, not copied
    groups = query.shape[1] // key.shape[1]
    query = query[0].unflatten(0, (-1, groups))
    key, value = (x[0].unsqueeze(1).expand(-1, groups, -1, -1) for x in (key, value))
    outputs = []
    for q, k, v in zip(*(x.split(_lengths, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        window = None
        if sliding_window is not None and sliding_window < length:
            window = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        if plain:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling
            )
        else:
            out = _attention_written_out(q, k, v, scaling, dropout, window, softcap, s_aux)
        outputs.append(out.flatten(0, 1).transpose(0, 1))
    return torch.cat(outputs)[None], None


def _flash_supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention has a kernel for this GPU, dtype and head size (which the varlen call does not pad)."""
    if not query.is_cuda or query.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1]))


def _attention_in_one_call(query, key, value, lengths, scaling, sliding_window) -> Tensor:
    """All examples in one call of torch's variable-length flash attention. Shapes as in `packed_attention`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    offsets, longest, gqa = _offsets(tuple(lengths), q.device), max(lengths), q.shape[1] != k.shape[1]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # keys before the query, keys after it
    y = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=window, enable_gqa=gqa)
    return y[None]


@functools.lru_cache(maxsize=1)  # the same for every layer of the model
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(examples + 1,) the start of each example in the row, and the end of the last."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return (offsets.pin_memory() if device.type == "cuda" else offsets).to(device, non_blocking=True)


def _attention_written_out(q, k, v, scaling, dropout, window, softcap, sinks) -> Tensor:
    """Attention with score capping and sinks, which F.scaled_dot_product_attention does not support.

    q, k, v: (kv_heads, group, tokens, head_dim), one example. window: (tokens, tokens), True where a query attends to a key.
    """
    length = q.shape[2]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if window is None:
        window = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.float().masked_fill(~window, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(*q.shape[:2], 1, 1).expand(-1, -1, length, 1)], dim=-1)
    weights = F.dropout(scores.softmax(-1), dropout)[..., :length]
    return weights.to(v.dtype) @ v


def _and_segments(mask: Callable) -> Callable:
    """Wrap a mask function of transformers: within `Isolation.row` it masks out the other examples of the row."""

    def masked(*args, mask_function, device="cpu", **kwargs):
        if _lengths is not None:
            segments = torch.arange(len(_lengths), device=device).repeat_interleave(
                torch.tensor(_lengths, device=device), output_size=sum(_lengths)
            )
            mask_function = and_masks(mask_function, packed_sequence_mask_function(segments[None]))
            kwargs["allow_is_causal_skip"] = False
        return mask(*args, mask_function=mask_function, device=device, **kwargs)

    return masked


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register("sdpa", _and_segments(sdpa_mask))
AttentionMaskInterface.register("eager", _and_segments(eager_mask))


def flat_row(examples: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """input_ids and position_ids (1, tokens) of a row of examples' token ids; positions restart at each example."""
    ids = torch.tensor([[i for example in examples for i in example]], device=device)
    positions = torch.cat([torch.arange(len(example), device=device) for example in examples])[None]
    return {"input_ids": ids, "position_ids": positions}


@torch.no_grad()
def isolates(model: PreTrainedModel, isolation: Isolation) -> bool:
    """Whether three short random examples in one row get the same logits as each alone."""
    generator, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
    examples = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (5, 3, 7)]
    with eval_mode(model):
        with isolation.row(model, [len(e) for e in examples]):
            together = model(**flat_row(examples, model.device), use_cache=False).logits[0].float()
        alone = torch.cat([model(**flat_row([e], model.device), use_cache=False).logits[0].float() for e in examples])
    tolerance = 1e-3 if model.dtype is torch.float32 and model.device.type == "cpu" else 0.1  # a GPU may use TF32
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())


def _frequencies_follow_length(model: PreTrainedModel, longest: int) -> bool:
    """Whether RoPE's frequencies change for a row that has a position beyond the original context."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]  # some families have one for each kind of layer
    return any(
        longest > (p.get("original_max_position_embeddings") or model.config.max_position_embeddings)
        for p in kinds
        if p.get("rope_type") in ("dynamic", "longrope")
    )
