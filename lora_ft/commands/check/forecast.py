"""How long a run may take, without loading the model: its arithmetic at the speed of this CPU's matrix products.

A frozen weight of a layer takes a product per token forward and one backward, a trained one a third, and a checkpointed one
another forward. `--time` measures what this leaves out: attention, memory, the libraries between the products.
"""

import time

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lora_ft.commands.check.timing import evaluations_of, products_of_step
from lora_ft.config.learning_rate import passes_of_trials
from lora_ft.data.batches import StepPlan
from lora_ft.model.load import dtype_of
from lora_ft.training.setup import RunSetup

OVERHEAD = 1.35  # of a step's time to that of its products: 1.1 to 1.7 for SmolLM2-135M on two cores
MEASURED_SECONDS, MEASURED_TOKENS = 0.1, 512


def forecast(setup: RunSetup, model: PreTrainedModel, plan: StepPlan) -> float | None:
    """Seconds of training, of `auto`'s trials, and of scoring the eval sets; None where this says too little.

    That is on a GPU, and of experts or state spaces. Texts that evaluations generate are not part of it. model: the adapted
    model without weights.
    """
    if setup.device != "cpu" or any(p.dim() > 2 for p in model.parameters()):
        return None
    embedding, ends = model.get_input_embeddings().weight, (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(p) for module in ends if module is not None for p in module.parameters()}
    layers = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in outside)
    train, full = setup.train_set.report, setup.config.adapter.method == "full"
    epochs = len(plan) / plan.steps_per_epoch
    tried, scored = passes_of_trials(setup.config, len(plan), train.used)
    of_steps = (
        products_of_step(setup.config) * layers * train.tokens + (2 + full) * embedding.numel() * train.supervised
    )
    products = (1 + tried) * epochs * of_steps
    products += scored * (layers * train.tokens + embedding.numel() * train.supervised)
    for examples in setup.eval_sets.values():
        of = examples.report
        products += evaluations_of(setup, len(plan)) * (layers * of.tokens + embedding.numel() * of.supervised)
    dtype = dtype_of(setup.base, setup.config.model.dtype, setup.device)
    return OVERHEAD * 2 * products / _flops_per_second(embedding.shape[1], dtype)


def _flops_per_second(width: int, dtype: torch.dtype) -> float:
    """The speed of a layer's product."""
    x, weight = torch.ones(MEASURED_TOKENS, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    linear(x, weight)
    count, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < MEASURED_SECONDS:
        linear(x, weight)
        count += 1
    return count * 2 * MEASURED_TOKENS * width * width / seconds
