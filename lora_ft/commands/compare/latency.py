"""Inference latency of what a run left, beside its bare base, by turns: the LoRA paper's section 4.1 and its table 1.

Base and adapted model are in memory together, in eval mode, one row of random ids; speed doesn't depend on what they say.
"""

import statistics
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lora_ft.core.messages import info
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.methods.interface import load, virtual_ids
from lora_ft.methods.lora.inject import merge
from lora_ft.methods.trained import Trained
from lora_ft.model.device import prepare_device
from lora_ft.model.load import load_base

PROMPT, NEW, ROUNDS = 64, 16, 20  # tokens read at once, tokens then generated one by one, measurements of each


def latency(folder: Path, trust: Trust = NO_TRUST) -> dict:
    """Of a run: "adapter" and (of LoRA alone) "merged", each with milliseconds and ratios to the base's.

    prompt_ms: for PROMPT tokens; token_ms: for each of NEW that follow; medians of ROUNDS. The ratios are medians of those
    of a round.
    """
    trained = Trained.open(folder)
    assert trained.config is not None, "a finished run"
    config, device, base = (
        trained.config,
        prepare_device(trained.config.trainer.use_cpu),
        trained.base(trust=trust),
    )
    bare = load_base(base, config.model.dtype, device)
    found: dict = {"prompt_tokens": PROMPT}
    for form in ("adapter", "merged") if trained.method == "lora" else ("adapter",):
        model = load_base(base, config.model.dtype, device)
        load(model, trained)
        if form == "merged":
            merge(model)
        info(f"  latency of {folder}, {form}: {ROUNDS} rounds")
        found[form] = paired(bare, model.eval())
        del model
    return found


def paired(bare: PreTrainedModel, other: PreTrainedModel) -> dict[str, float]:
    """The other's latency and its ratio to the bare base's, each round of one beside the other, in changing order."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(bare.get_input_embeddings().num_embeddings, (1, PROMPT), generator=generator).to(bare.device)
    virtual = torch.tensor([virtual_ids(other)], dtype=ids.dtype, device=ids.device)
    prompts = {"base": (bare, ids), "other": (other, torch.cat([virtual, ids], dim=1))}
    seconds: dict[str, list[tuple[float, float]]] = {"base": [], "other": []}
    for n in range(ROUNDS + 1):
        for who in ("base", "other") if n % 2 else ("other", "base"):
            seconds[who].append(answer(*prompts[who]))
    pairs = list(zip(seconds["base"][1:], seconds["other"][1:], strict=True))  # without the first, which warms up
    found = {}
    for place, name in enumerate(("prompt", "token")):
        found[f"{name}_ms"] = round(1000 * statistics.median(b[place] for _, b in pairs), 2)
        found[f"base_{name}_ms"] = round(1000 * statistics.median(a[place] for a, _ in pairs), 2)
        found[f"{name}_ratio"] = round(statistics.median(b[place] / a[place] for a, b in pairs), 4)
    return found


@torch.no_grad()
def answer(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds for reading the prompt, and for each token then generated greedily."""
    begun = _now(model)
    out = model(input_ids=ids, use_cache=True)
    read = _now(model)
    for _ in range(NEW):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return read - begun, (_now(model) - read) / NEW


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
