"""Next-token loss on the supervised tokens of a flat row."""

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def supervised_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
    """Logits (len(keep), vocabulary) at the positions `keep` of a row (1, tokens); no others are computed.

    `use_cache=False` matters beyond memory: with a cache, transformers ignores restarting positions.
    """
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=keep).logits[0]


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, in float32. logits (tokens, vocabulary), targets (tokens,)."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")
