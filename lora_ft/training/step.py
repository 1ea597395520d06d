"""What one optimizer step computes: the gradients of its micro-batches, summed over the processes.

The loss is the sum over supervised tokens divided by their number in the whole step, so that cutting a step into micro-batches
or sharing it out over processes changes no gradient beyond rounding.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft.core.errors import NumbersError
from lora_ft.data.batches import Shard, Step, on_device
from lora_ft.distributed import processes
from lora_ft.methods.lora.inject import trainable
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import supervised_loss


def add_gradients(
    model: PreTrainedModel,
    isolation: Isolation,
    step: Step,
    shard: Shard,
    autocast: Callable[[], AbstractContextManager],
    check: Callable[[], None],
) -> Tensor:
    """Add the gradients of a step's mean loss to the adapter's, on every process alike; the loss, summed over its tokens.

    shard: what `step` is of the whole. check: called before each micro-batch, the place to stop at.
    """
    total = torch.zeros((), device=model.device)
    for micro in step["micro"]:
        check()
        if not len(micro["keep"]) and not shard.padded:
            continue
        micro = on_device(micro, model.device)
        with isolation.row(model, micro["lengths"]):  # still open in the backward: checkpointing recomputes
            with autocast():
                loss = supervised_loss(
                    model, micro["input_ids"], micro["position_ids"], micro["keep"], micro["targets"]
                )
            (loss / max(1, step["total"])).backward()
        total += loss.detach()
    check()
    if shard.world_size > 1:
        processes.all_reduce_gradients(list(trainable(model).values()), total)
    return total


def check_finite(number: int, step: Step, loss: float, grad_norm: float) -> None:
    """NumbersError if a step's loss or gradient is NaN or inf."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise NumbersError(
            f"step {number}: the {what} is not a finite number. The step's rows: {', '.join(step['rows'][:16])}. "
            f" Nothing of it was saved. Lower train.learning_rate, or look at those rows."
        )
