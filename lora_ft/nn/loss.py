"""Next-token loss on the supervised tokens of a flat row, without the logits of any other token.

Few supervised tokens: the model is asked for their logits alone. Many: the body runs once, and the head a chunk of tokens at a
time, so that memory doesn't grow with vocabulary x tokens. Either way the head's arithmetic (Cohere's and Granite's scaling,
Gemma 2's capping) is the model's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

CHUNK = 256  # tokens whose logits are in memory at a time; half of that makes E2E's step 4% longer, its peak 3% smaller
LARGEST = 512  # a quarter of many tokens may be as many as this: other tensors need more memory by then


@dataclass
class BodyOutput(ModelOutput):
    """What any family's forward may look for in its body's output."""

    last_hidden_state: Tensor | None = None
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None
    router_logits: None = None
    image_hidden_states: None = None


def supervised_loss(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy of `targets` after the positions `keep` of a row (1, tokens), summed, in float32."""
    if len(keep) <= CHUNK:
        return summed_loss(supervised_logits(model, input_ids, position_ids, keep), targets)
    hidden = supervised_hidden(model, input_ids, position_ids, keep)
    head = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    if not hidden.requires_grad and not head:
        return sum(_head_losses(model, hidden, targets), hidden.new_zeros((), dtype=torch.float32))
    return _ChunkedLoss.apply(hidden, model, targets, *head)


def supervised_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """Logits (len(keep), vocabulary) at the positions `keep` of a row (1, tokens); no others are computed.

    `use_cache=False` matters beyond memory: with a cache, transformers ignores restarting positions.
    """
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=keep).logits.squeeze(0)


def logits_in_chunks(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Iterator[Tensor]:
    """The same, a chunk of them at a time; for scoring."""
    if len(keep) <= CHUNK:
        yield supervised_logits(model, input_ids, position_ids, keep)
    else:
        hidden = supervised_hidden(model, input_ids, position_ids, keep)
        yield from (head_logits(model, h) for h in chunks(hidden))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, in float32. logits (tokens, vocabulary), targets (tokens,)."""
    return _SummedLoss.apply(logits, targets)


def supervised_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """What the head would read at the positions `keep`: (len(keep), width)."""
    seen: list[Tensor] = []
    hook = body_of(model).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        supervised_logits(model, input_ids, position_ids, keep[:0])
    finally:
        hook.remove()
    return seen[0][0, keep]


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits (tokens, vocabulary) of hidden states (tokens, width): its forward, the body standing in."""
    with _body_returns(model, hidden[None]):
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits.squeeze(0)


def chunks(of_tokens: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor (tokens, ...), so many tokens each as may have their logits in memory at a time."""
    return of_tokens.split(max(CHUNK, min(len(of_tokens) // 4, LARGEST)))


def body_of(model: PreTrainedModel) -> nn.Module:
    """The module whose output the head reads."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


@contextmanager
def _body_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    body = body_of(model)
    body.forward = lambda *_, **__: BodyOutput(last_hidden_state=hidden)
    try:
        yield
    finally:
        del body.forward  # the class's own again


def _head_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
    for h, t in zip(chunks(hidden), chunks(targets), strict=True):
        yield summed_loss(head_logits(model, h), t)


class _SummedLoss(torch.autograd.Function):
    """L = -sum_t log p_t[y_t] with p = softmax(logits); dL/dlogits = p - onehot(y).

    log p is turned into that gradient in place on the way: F.cross_entropy would hold four tensors of this size at once.
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
    """The summed loss of hidden states (tokens, width), its gradient taken chunk by chunk on the way.

    With L the sum of the chunks' losses, dL/dh of a chunk depends on that chunk alone. So it is computed right after the
    chunk's loss and only dL/dh is kept, (tokens, width); the backward multiplies it by the gradient of L, a scalar.
    """

    @staticmethod
    def forward(ctx, hidden, model, targets, *head):
        grad, grads, loss = torch.empty_like(hidden), [torch.zeros_like(p) for p in head], 0
        for h, g, t in zip(chunks(hidden), chunks(grad), chunks(targets), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                piece = summed_loss(head_logits(model, h), t)
                found = torch.autograd.grad(piece, [h, *head])
            g.copy_(found[0])
            for total, part in zip(grads, found[1:], strict=True):
                total += part
            loss += piece.detach()
        ctx.save_for_backward(grad, *grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dL):
        grad, *grads = ctx.saved_tensors
        return grad * dL, None, None, *(g * dL for g in grads)
