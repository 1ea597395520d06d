"""The gradients of one optimizer step: its micro-batches added up, then summed over the processes.

The loss is the sum over supervised tokens divided by their number in the complete step. So neither cutting a step into
micro-batches nor distributing it over processes changes a gradient beyond rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_ft.core.errors import NumbersError
from lora_ft.data.batches import Shard, Step
from lora_ft.distributed import processes
from lora_ft.methods.lora.inject import trainable
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import supervised_loss


def add_gradients(
    model: PreTrainedModel, isolation: Isolation, step: Step, shard: Shard, check: Callable[[], None]
) -> Tensor:
    """Add the gradients of a step's mean loss to those of the trainable parameters, equally on every process.

    Args:
        shard: the part of the step that `step` is.
        check: called before each micro-batch and after the last one; may raise to stop.

    Returns:
        The loss summed over the supervised tokens of all processes, a scalar on the model's device.
    """
    total = torch.zeros((), device=model.device)
    for micro in step["micro"]:
        check()
        if not len(micro["keep"]) and not shard.padded:
            continue
        # copies from pinned memory are asynchronous
        inputs = {key: x.to(model.device, non_blocking=True) for key, x in micro.items() if isinstance(x, Tensor)}
        with isolation.row(model, micro["segments"]):  # open during the backward too: checkpointing recomputes
            loss = supervised_loss(model, **inputs)
            (loss / max(1, step["total"])).backward()
        total += loss.detach()
    check()
    if shard.world_size > 1:
        processes.all_reduce_gradients(list(trainable(model).values()), total)
    return total


def check_finite(number: int, step: Step, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Keep NaN and infinity out of the weights: checks the loss and the norm of all gradients that `optimizer` would follow.

    Raises:
        NumbersError: names step `number` and its rows.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.stack([loss, norm.to(loss)]).isfinite().tolist()
    if not all(finite):
        raise NumbersError(
            f"step {number}: the {'gradient' if finite[0] else 'loss'} is not a finite number. Nothing of the step was "
            f"saved. Its rows: {', '.join(step['rows'][:16])}. Lower train.learning_rate, or check these rows."
        )
