"""Next-token loss on the supervised tokens of a flat row; no logits are computed for other tokens.

With many supervised tokens the body runs once and the head on one chunk of tokens at a time, so that memory does not grow with
vocabulary x tokens. The model's own forward always applies the head, with its scaling (Cohere, Granite) or capping (Gemma 2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

CHUNK = 256  # tokens whose logits are in memory at a time; with 128 a step on E2E takes 4% longer and 3% less memory
LARGEST_CHUNK = 512  # a quarter of the tokens, at most this many: with many tokens other tensors dominate the memory


@dataclass
class BodyOutput(ModelOutput):
    """The last hidden states as the output of a model's body; every other attribute that a forward may read is None."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:  # not fields: transformers 5.24 renames past_key_values to cache
        return None


def supervised_loss(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy summed over the supervised tokens of a flat row (1, tokens), a float32 scalar.

    keep: (supervised,) the positions whose next token is supervised. targets: (supervised,) the ids of these next tokens.
    """
    return supervised_losses(model, input_ids, position_ids, keep, targets, [len(keep)])[0]


def supervised_losses(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    keep: Tensor,
    targets: Tensor,
    counts: Sequence[int],
) -> list[Tensor]:
    """The same sum apart for the first counts[0] supervised tokens, the next counts[1], and so on."""
    if len(keep) <= CHUNK:
        logits = supervised_logits(model, input_ids, position_ids, keep)
        return [*map(summed_loss, logits.split(counts), targets.split(counts))]
    hidden = supervised_hidden(model, input_ids, position_ids, keep)
    head = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    parts = zip(hidden.split(counts), targets.split(counts), strict=True)
    return [_ChunkedLoss.apply(h, model, t, *head) for h, t in parts]


def supervised_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """Logits (len(keep), vocabulary) at the positions `keep` of a row (1, tokens); no others are computed.

    `use_cache=False` because transformers ignores restarting positions when there is a cache.
    """
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=keep).logits.squeeze(0)


def logits_in_chunks(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Iterator[Tensor]:
    """The same logits in chunks (chunk, vocabulary), for scoring."""
    if len(keep) <= CHUNK:
        yield supervised_logits(model, input_ids, position_ids, keep)
    else:
        hidden = supervised_hidden(model, input_ids, position_ids, keep)
        yield from (head_logits(model, h) for h in chunks(hidden))


def log_probabilities(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor, targets: Tensor
) -> Tensor:
    """The log-probabilities (len(keep),), float32, of `targets` as the tokens after the positions `keep` of a row (1, tokens).

    A position may occur several times.
    """
    positions, which = keep.unique(return_inverse=True)
    found, start = torch.empty(len(targets), device=input_ids.device), 0
    for logits in logits_in_chunks(model, input_ids, position_ids, positions):  # (chunk, vocabulary)
        here = ((which >= start) & (which < start + len(logits))).nonzero()[:, 0]
        at = which[here] - start
        found[here] = logits[at, targets[here]].float() - logits.float().logsumexp(-1)[at]
        start += len(logits)
    return found


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, in float32. logits (tokens, vocabulary), targets (tokens,)."""
    return _SummedLoss.apply(logits, targets)


def supervised_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """The input of the head at the positions `keep` of a row (1, tokens): (len(keep), width)."""
    outputs: list[Tensor] = []
    hook = body_of(model).register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        supervised_logits(model, input_ids, position_ids, keep[:0])
    finally:
        hook.remove()
    return outputs[0][0, keep]


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) of hidden states (tokens, width): the model's forward with these as the body's output."""
    ids, body = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device), body_of(model)
    body.forward = lambda *_, **__: BodyOutput(last_hidden_state=hidden[None])
    try:
        return model(input_ids=ids, use_cache=False).logits.squeeze(0)
    finally:
        del body.forward  # the class's own again


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views (chunk, ...) of a tensor (tokens, ...), each of as many tokens as may have their logits in memory at a time."""
    return tensor.split(max(CHUNK, min(len(tensor) // 4, LARGEST_CHUNK)))


def body_of(model: PreTrainedModel) -> nn.Module:
    """The module whose output is the input of the head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


class _SummedLoss(torch.autograd.Function):
    """L = -sum_t log p_t[y_t] with p = softmax(logits); dL/dlogits = p - onehot(y).

    log p becomes this gradient in place during the forward: F.cross_entropy would hold four tensors of this size at once.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        gradient = F.log_softmax(logits, -1, dtype=torch.float32)
        at_target = gradient.gather(-1, targets[:, None])
        if ctx.needs_input_grad[0]:
            gradient.exp_().scatter_add_(-1, targets[:, None], torch.full_like(at_target, -1.0))
            ctx.save_for_backward(gradient)
            ctx.dtype = logits.dtype
        return -at_target.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dL):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(dL).to(ctx.dtype), None  # in place: a second backward would raise


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of hidden states (tokens, width), with gradients computed chunk by chunk during the forward.

    L sums over chunks, so dL/dh of a chunk depends on it alone and can be computed right after its loss. Only dL/dh (tokens,
    width) is kept; the backward multiplies it by the gradient of L, a scalar.
    """

    @staticmethod
    def forward(ctx, hidden, model, targets, *head):
        grad, grads, loss = torch.empty_like(hidden), [torch.zeros_like(p) for p in head], 0
        for h, g, t in zip(chunks(hidden), chunks(grad), chunks(targets), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                chunk_loss = summed_loss(head_logits(model, h), t)
                dh, *dhead = torch.autograd.grad(chunk_loss, [h, *head])
            g.copy_(dh)
            for total, part in zip(grads, dhead, strict=True):
                total += part
            loss += chunk_loss.detach()
        ctx.save_for_backward(grad, *grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dL):
        grad, *grads = ctx.saved_tensors
        return grad * dL, None, None, *(g * dL for g in grads)
