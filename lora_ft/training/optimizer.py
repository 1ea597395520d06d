"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354, section 4)."""

import torch
from torch import nn

from lora_ft.methods.lora.inject import lora_layers


def learn_b_faster(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Give each B of the model's LoRA layers `ratio` times the learning rate; the groups of A come first, and are logged."""
    of_b = {id(B) for layer in lora_layers(model).values() for B in layer.lora_B.values()}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for faster, factor in ((False, 1.0), (True, ratio)):
        for group in groups:
            parameters = [p for p in group["params"] if (id(p) in of_b) is faster]
            if parameters:
                optimizer.add_param_group(group | {"params": parameters, "lr": group["lr"] * factor})
