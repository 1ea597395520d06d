"""Keeping the examples of a flat row apart.

A micro-batch is one row (1, tokens) of several examples, one after the other, without padding, with positions that restart at
each. Restarting positions alone don't isolate the examples in every family, so there are three ways, best first:

- ATTENTION: an attention of our own through transformers' AttentionInterface; each example costs its own length squared.
- MASK: for families with attention code of their own (BLOOM, Falcon, GPT-J, GPT-Neo, ...): the model's attention over the
  whole row with a block mask.
- ONE_PER_ROW: one example a row, where neither isolates (RoPE whose frequencies follow the longest position in the row).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import and_masks, eager_mask, packed_sequence_mask_function, sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer
except ImportError:
    varlen_attn = None

NAME = "lora_ft_packed"
OWN_ATTENTION = {"bloom", "codegen"}  # take any attention's name, and never call it
_lengths: list[int] | None = None  # of the examples in the row that is being computed; models pass no such thing down


class Isolation(Enum):
    """How a model keeps the examples of a row apart (see the module's docstring)."""

    ATTENTION = "attention"
    MASK = "mask"
    ONE_PER_ROW = "one per row"

    @classmethod
    def detect(cls, model: PreTrainedModel, longest: int) -> "Isolation":
        """The best way that was seen to isolate examples on this very model.

        Args:
            longest: tokens of the longest example to come.
        """
        if not _frequencies_follow_length(model, longest):
            for way in (cls.ATTENTION, cls.MASK):
                if (way is cls.MASK or model._supports_attention_backend) and isolates(model, way):
                    return way
        return cls.ONE_PER_ROW

    @classmethod
    def guess_from_config(cls, model: PreTrainedModel, longest: int) -> "Isolation":
        """What `detect` will most likely find, by what the model says of itself: for a model without weights."""
        if _frequencies_follow_length(model, longest):
            return cls.ONE_PER_ROW
        own = model.config.model_type in OWN_ATTENTION or not model._supports_attention_backend
        return cls.MASK if own else cls.ATTENTION

    @contextmanager
    def row(self, model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
        """Within: `model` sees one row of examples of these lengths. Keep it open until the backward is done."""
        global _lengths
        usual = model.config._attn_implementation
        if self is Isolation.ATTENTION:
            model.config._attn_implementation = NAME
        _lengths = list(lengths)
        try:
            yield
        finally:
            _lengths = None
            model.config._attn_implementation = usual


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each example of the row.

    query (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim) -> (1, tokens, heads, head_dim).
    `sliding_window`: attend where 0 <= i - j < window. `softcap` c: scores become c tanh(scores / c) (Gemma 2). `s_aux`
    (heads,): attention sinks, a score each head may put its weight on instead (GPT-OSS).
    """
    assert _lengths is not None and sum(_lengths) == query.shape[2], "packed attention outside of Packing.row"
    dropout = dropout if module.training else 0.0
    plain = softcap is None and s_aux is None
    if plain and not dropout and varlen_attn and _flash_can(query, key, value):
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
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            window = (distance >= 0) & (distance < sliding_window)
        if plain:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling
            )
        else:
            out = _attention_written_out(q, k, v, scaling, dropout, window, softcap, s_aux)
        outputs.append(out.flatten(0, 1).transpose(0, 1))
    return torch.cat(outputs)[None], None


def _flash_can(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention has a kernel for these: torch knows by GPU, dtype and head size; the varlen call pads none."""
    if not query.is_cuda or query.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1]))


def _attention_in_one_call(query, key, value, lengths, scaling, sliding_window) -> Tensor:
    """All examples at once by torch's variable-length flash attention. Shapes as in `packed_attention`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    ends = _ends(tuple(lengths), q.device)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # to the left, to the right
    gqa = q.shape[1] != k.shape[1]
    longest = max(lengths)
    return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=gqa)[None]


@functools.lru_cache(maxsize=1)  # every layer of the model asks for the same
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0, and where each example ends; (examples + 1,)."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return (ends.pin_memory() if device.type == "cuda" else ends).to(device, non_blocking=True)


def _attention_written_out(q, k, v, scaling, dropout, window, softcap, sinks) -> Tensor:
    """What scaled_dot_product_attention can't do: score capping and sinks. Shapes (kv_heads, group, tokens, head_dim)."""
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
    """transformers' mask function, with other examples of the row masked out while a row is open."""

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


def flat(examples: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """input_ids and position_ids (1, tokens) of a row of examples; positions restart at each."""
    ids = torch.tensor([[i for example in examples for i in example]], device=device)
    positions = torch.cat([torch.arange(len(example), device=device) for example in examples])[None]
    return {"input_ids": ids, "position_ids": positions}


@torch.no_grad()
def isolates(model: PreTrainedModel, isolation: Isolation) -> bool:
    """Whether three short random examples in one row get the logits that each gets alone."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    examples = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (5, 3, 7)]
    was_training = model.training
    model.eval()
    try:
        with isolation.row(model, [len(e) for e in examples]):
            together = model(**flat(examples, model.device), use_cache=False).logits[0].float()
        alone = torch.cat([model(**flat([e], model.device), use_cache=False).logits[0].float() for e in examples])
    finally:
        model.train(was_training)
    exact = model.dtype is torch.float32 and model.device.type == "cpu"  # a GPU may use TF32
    tolerance = 1e-3 if exact else 0.1
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())


def _frequencies_follow_length(model: PreTrainedModel, longest: int) -> bool:
    """RoPE kinds that switch or scale frequencies when a row has a position beyond the original context."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]  # some families have one for each kind of layer
    switching = [p for p in kinds if p.get("rope_type") in ("dynamic", "longrope")]
    return any(
        longest > (p.get("original_max_position_embeddings") or model.config.max_position_embeddings) for p in switching
    )
