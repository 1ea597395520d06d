"""Several adapters on one base: a mixed batch against its rows one at a time, switching, and memory.

    python benchmarks/many_adapters.py MODEL [--rows 16] [--adapters 8] [--rank 8] [--targets q,v] [--prompt 32] [--json FILE]

Each round times the next token of all rows in one mixed batch (`mixed`), and of each row alone with its adapter (`use`).
Both are timed twice: a forward pass of one token per row after a cached prompt, and `generate(max_new_tokens=1)` including
the prompt. Prints medians over the rounds. The logits of both ways are compared first.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM

from lora_ft import inject_lora, load_adapter, mixed, use
from lora_ft.methods.lora.files import save_adapter
from lora_ft.methods.lora.inject import lora_layers
from lora_ft.methods.lora.multi import shared_layers


def write_adapters(model, folder: Path, count: int, rank: int, targets: list[str]) -> list[str]:
    """Write adapters with random B of a trained adapter's magnitude, alternating between `rank` and half of it."""
    names = []
    for i in range(count):
        adapted = copy.deepcopy(model)
        inject_lora(adapted, targets, max(1, rank >> i % 2), 2.0 * rank, seed=i)
        for layer in lora_layers(adapted).values():
            for B in layer.lora_B.values():
                B.data.normal_(std=0.02)
        names.append(f"adapter{i}")
        (folder / names[-1]).mkdir()
        save_adapter(adapted, folder / names[-1], "base")
    return names


def seconds(function) -> float:
    """Wall-clock seconds of one call."""
    start = perf_counter()
    function()
    return perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Measure and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q,v")
    parser.add_argument("--prompt", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    base_bytes = sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        names = write_adapters(model, Path(folder), options.adapters, options.rank, options.targets.split(","))
        load = [seconds(lambda n=name: load_adapter(model, f"{folder}/{n}", n)) for name in names]
    rows = [names[i % len(names)] for i in range(options.rows)]
    ids = torch.randint(3, model.config.vocab_size, (options.rows, options.prompt + 1))
    prompts, token = ids[:, :-1], ids[:, -1:]

    def cache(name, ids):
        use(model, name)
        return model(input_ids=ids, use_cache=True).past_key_values

    solo_caches = [cache(name, prompts[i : i + 1]) for i, name in enumerate(rows)]
    with mixed(model, rows):
        mixed_cache = model(input_ids=prompts, use_cache=True).past_key_values
    base_cache = cache(None, prompts)

    def next_token(ids, past):
        logits = model(input_ids=ids, past_key_values=past, use_cache=True).logits[:, -1]
        past.crop(-1)
        return logits

    def solo():
        logits = []
        for i, name in enumerate(rows):
            use(model, name)
            logits.append(next_token(token[i : i + 1], solo_caches[i]))
        return torch.cat(logits)

    def generate(ids):
        mask = torch.ones_like(ids)
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None
        )

    def generate_solo():
        for i, name in enumerate(rows):
            use(model, name)
            generate(prompts[i : i + 1])

    times: dict[str, list[float]] = {}
    alone = solo()
    with mixed(model, rows):
        difference = (next_token(token, mixed_cache) - alone).abs().max().item()
    bare_caches = [cache(None, prompts[i : i + 1]) for i in range(options.rows)]
    bare = torch.cat([next_token(token[i : i + 1], past) for i, past in enumerate(bare_caches)])
    base_difference = (next_token(token, base_cache) - bare).abs().max().item()
    for _ in range(options.rounds):
        times.setdefault("token, one at a time", []).append(seconds(solo))
        times.setdefault("generate, one at a time", []).append(seconds(generate_solo))
        with mixed(model, rows):
            times.setdefault("token, mixed batch", []).append(seconds(lambda: next_token(token, mixed_cache)))
            times.setdefault("generate, mixed batch", []).append(seconds(lambda: generate(prompts)))
        times.setdefault("token, base alone, same batch", []).append(seconds(lambda: next_token(token, base_cache)))
        times.setdefault("stacking a mixed batch", []).append(seconds(lambda: mixed(model, rows).__enter__()))
        times.setdefault("switching", []).append(seconds(lambda: use(model, names[0])))
    ms = {what: round(1000 * median(values), 3) for what, values in times.items()}
    parameters = [p for layer in shared_layers(model).values() for a in layer.adapters.values() for p in a.parameters()]
    adapter_bytes = sum(p.nbytes for p in parameters) - sum(
        p.nbytes for layer in shared_layers(model).values() for p in layer.base.parameters() for _ in layer.adapters
    )
    result = {
        **{key: value for key, value in vars(options).items() if key != "json"},
        "largest_logit": alone.abs().max().item(),
        "largest_difference_mixed_from_alone": difference,
        "largest_difference_of_the_bare_base_batch_from_alone": base_difference,
        "milliseconds": ms,
        "times_faster": {
            kind: round(ms[f"{kind}, one at a time"] / ms[f"{kind}, mixed batch"], 2) for kind in ("token", "generate")
        },
        "loading_one_adapter_ms": round(1000 * median(load), 1),
        "base_mb": round(base_bytes / 1e6, 2),
        "adapters_mb": round(adapter_bytes / 1e6, 2),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
