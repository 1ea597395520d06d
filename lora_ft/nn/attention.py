"""Attention within each sequence of a flat row (nn/rows.py).

A micro-batch is one row (1, tokens): several sequences one after the other, without padding, positions restarting at each. In
many families positions alone do not keep them apart. There are three ways to do so, best first:

- ATTENTION: `packed_attention`, registered in transformers' AttentionInterface. A sequence costs its length squared.
- MASK: the model's attention over the row with a mask of segments, for families that have their own attention code (BLOOM,
  Falcon, GPT-J, GPT-Neo, ...). A row costs its length squared.
- ONE_PER_ROW: one sequence per row, for RoPE whose frequencies depend on the longest position in the row.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import and_masks, causal_mask_function, eager_mask, sdpa_mask

from lora_ft.nn.adapted import eval_mode
from lora_ft.nn.joint import drawing_at
from lora_ft.nn.layout import Layout
from lora_ft.nn.rows import WORTHWHILE, FlatRow, Segment, flat_row

try:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer
except ImportError:
    varlen_attn = None

NAME = "lora_ft_packed"
_layout: Layout | None = None  # of the current row; a global: models pass no such argument down


class Isolation(Enum):
    """How the sequences of a row are kept apart in a model (see the module's docstring)."""

    ATTENTION = "attention"
    MASK = "mask"
    ONE_PER_ROW = "one per row"

    @classmethod
    def detect(cls, model: PreTrainedModel, longest: int) -> "Isolation":
        """The best way that isolates sequences of up to `longest` tokens, found by computing with the loaded model."""
        if not frequencies_follow_length(model, longest):
            for way in (cls.ATTENTION, cls.MASK):
                if (way is cls.MASK or model._supports_attention_backend) and isolates(model, way):
                    return way
        return cls.ONE_PER_ROW

    @classmethod
    def guess_from_config(cls, model: PreTrainedModel, longest: int) -> "Isolation":
        """The way that `detect` will most likely find, from the config: for a model without weights."""
        if frequencies_follow_length(model, longest):
            return cls.ONE_PER_ROW
        # BLOOM accepts any attention implementation by name, but never calls it
        calls_interface = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
        return cls.ATTENTION if model._supports_attention_backend and calls_interface else cls.MASK

    @contextmanager
    def row(self, model: PreTrainedModel, segments: Sequence[Segment]) -> Iterator[None]:
        """Within it `model` computes one row of these segments. It must include the backward."""
        global _layout
        default = model.config._attn_implementation
        if self is Isolation.ATTENTION:
            model.config._attn_implementation = NAME
        _layout = Layout(segments)
        try:
            yield
        finally:
            _layout = None
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
    """Causal attention within each sequence of the row: (1, tokens, heads, head_dim), and None for the weights."""
    assert _layout is not None and _layout.tokens == query.shape[2], "packed_attention outside of Isolation.row"
    dropout = dropout if module.training else 0.0
    plain = softcap is None and s_aux is None
    if plain and not dropout and varlen_attn and _flash_supports(query, key, value):
        return _attention_in_one_call(query, key, value, _layout, scaling, sliding_window), None
    # (kv_heads, group, tokens, head_dim): a group of query heads reads one key head, which is expanded, not copied
    groups = query.shape[1] // key.shape[1]
    queries = query[0].unflatten(0, (-1, groups)).split(_layout.lengths, dim=2)
    keys, values = (x[0].split(_layout.lengths, dim=1) for x in (key, value))
    outputs, token = [], 0
    for i, q in enumerate(queries):
        k, v = (_joined(parts, _layout.reads[i]).unsqueeze(1).expand(-1, groups, -1, -1) for parts in (keys, values))
        mask = _layout.mask(i, sliding_window, q.device)
        with drawing_at(token, (module, i)) if dropout else nullcontext():
            if plain:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
                )
            else:
                out = _attention_written_out(q, k, v, scaling, dropout, mask, softcap, s_aux)
        token += _layout.lengths[i]
        outputs.append(out.flatten(0, 1).transpose(0, 1))
    return torch.cat(outputs)[None], None


def _joined(parts: Sequence[Tensor], which: list[int]) -> Tensor:
    """Some of the parts (kv_heads, tokens, head_dim) as one tensor."""
    return parts[which[0]] if len(which) == 1 else torch.cat([parts[i] for i in which], dim=1)


def _flash_supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention has a kernel for this GPU, dtype and head size (which the varlen call does not pad)."""
    if not query.is_cuda or query.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1]))


def _attention_in_one_call(query, key, value, layout, scaling, sliding_window) -> Tensor:
    """All segments in one call of torch's variable-length flash attention. Shapes as in `packed_attention`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    at, window = (
        layout.offsets(q.device),
        (-1 if sliding_window is None else sliding_window - 1, 0),
    )  # before, after a query
    if at.gather is not None:
        k, v = k[at.gather], v[at.gather]
    lengths = at.queries, at.keys, at.longest_query, at.longest_key
    y = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1])
    return y[None]


def _attention_written_out(q, k, v, scaling, dropout, mask, softcap, sinks) -> Tensor:
    """Attention with score capping and sinks, which F.scaled_dot_product_attention does not support.

    q, k, v: (kv_heads, group, tokens, head_dim). mask: (queries, keys), True where a query attends to a key; None if that is
    plainly causal.
    """
    length = k.shape[2]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(*q.shape[:2], 1, 1).expand(-1, -1, q.shape[2], 1)], dim=-1)
    weights = torch.dropout(scores.softmax(-1), dropout, dropout > 0)[..., :length]
    return weights.to(v.dtype) @ v


def _and_segments(mask: Callable) -> Callable:
    """Wrap a mask function of transformers: within `Isolation.row` it masks out what a token's sequence does not hold."""

    def masked(*args, mask_function, device="cpu", **kwargs):
        if _layout is not None:
            segment, continues = _layout.segment_of.to(device), _layout.continues.to(device)
            if _layout.shared:  # transformers takes a position that jumps for the start of another sequence
                mask_function = causal_mask_function
            mask_function = and_masks(mask_function, lambda b, h, q, k: continues[segment[q], segment[k]])
            kwargs["allow_is_causal_skip"] = False
        return mask(*args, mask_function=mask_function, device=device, **kwargs)

    return masked


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register("sdpa", _and_segments(sdpa_mask))
AttentionMaskInterface.register("eager", _and_segments(eager_mask))


def isolates(model: PreTrainedModel, isolation: Isolation) -> bool:
    """Whether three short random sequences in one row get the same logits as each alone."""
    return _equal_alone(model, isolation, [_random_ids(model, n) for n in (5, 3, 7)], share=False)


def shares(model: PreTrainedModel, isolation: Isolation) -> bool:
    """Whether sequences whose common beginnings are there once get the same logits as each alone.

    Found by computing, but for windows: a mask over a whole row measures them in the row, not in a sequence.
    """
    if isolation is Isolation.ONE_PER_ROW or (isolation is Isolation.MASK and has_windows(model)):
        return False
    head, middle = _random_ids(model, WORTHWHILE // 2), _random_ids(model, WORTHWHILE)
    ends = [_random_ids(model, n) for n in (3, 2, 4)]
    return _equal_alone(model, isolation, [head + ends[0], *(head + middle + end for end in ends[1:])], share=True)


def has_windows(model: PreTrainedModel) -> bool:
    """Whether a layer of the model attends to the last tokens only, as far as its config says."""
    config = model.config.get_text_config()
    windows = any(getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size"))
    return windows and getattr(config, "use_sliding_window", True) is not False


def _random_ids(model: PreTrainedModel, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(model.get_input_embeddings().num_embeddings, (count,), generator=generator).tolist()


@torch.no_grad()
def _equal_alone(model: PreTrainedModel, isolation: Isolation, sequences: list[list[int]], share: bool) -> bool:
    def logits(isolation: Isolation, row: FlatRow) -> Tensor:
        with isolation.row(model, row.segments):
            return model(**row.inputs, use_cache=False).logits[0].float()

    with eval_mode(model):
        row = flat_row(sequences, share, model.device)
        together = logits(isolation, row)[torch.cat(row.places)]
        alone = torch.cat([logits(isolation, flat_row([s], False, model.device)) for s in sequences])
    tolerance = 1e-3 if model.dtype is torch.float32 and model.device.type == "cpu" else 0.1  # a GPU may use TF32
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())


def frequencies_follow_length(model: PreTrainedModel, longest: int) -> bool:
    """Whether RoPE's frequencies change for a row that has a position beyond the original context."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]  # some families have one for each kind of layer
    return any(
        longest > (p.get("original_max_position_embeddings") or model.config.max_position_embeddings)
        for p in kinds
        if p.get("rope_type") in ("dynamic", "longrope")
    )
