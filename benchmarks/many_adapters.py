"""Many adapters on one base: a mixed batch against its rows one at a time, switching, and memory.

    python benchmarks/many_adapters.py MODEL [--rows 16] [--adapters 8] [--rank 8] [--targets q,v] [--prompt 32] [--json FILE]

Each round times, one after the other: one token generated for all rows at once (`mixed`), and for each row alone with its
own adapter (`use`). Both are timed twice: a forward pass of one token a row after a cached prompt, and a whole
`generate(max_new_tokens=1)`, prompt included. Medians over the rounds, which interleave; the answers are compared first.
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
    """Random adapters, B of a trained one's size; alternately of `rank` and half of it."""
    names = []
    for i in range(count):
        one = copy.deepcopy(model)
        inject_lora(one, targets, max(1, rank >> i % 2), 2.0 * rank, seed=i)
        for layer in lora_layers(one).values():
            for B in layer.lora_B.values():
                B.data.normal_(std=0.02)
        names.append(f"adapter{i}")
        (folder / names[-1]).mkdir()
        save_adapter(one, folder / names[-1], "base")
    return names


def seconds(function) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q,v")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(asked.model).eval()
    base_bytes = sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        names = write_adapters(model, Path(folder), asked.adapters, asked.rank, asked.targets.split(","))
        load = [seconds(lambda n=name: load_adapter(model, f"{folder}/{n}", n)) for name in names]
    rows = [names[i % len(names)] for i in range(asked.rows)]
    ids = torch.randint(3, model.config.vocab_size, (asked.rows, asked.prompt + 1))
    prompts, token = ids[:, :-1], ids[:, -1:]

    def cache(name, some):
        use(model, name)
        return model(input_ids=some, use_cache=True).past_key_values

    solo_caches = [cache(name, prompts[i : i + 1]) for i, name in enumerate(rows)]
    with mixed(model, rows):
        mixed_cache = model(input_ids=prompts, use_cache=True).past_key_values
    base_cache = cache(None, prompts)

    def next_token(some, past):
        logits = model(input_ids=some, past_key_values=past, use_cache=True).logits[:, -1]
        past.crop(-1)
        return logits

    def solo():
        found = []
        for i, name in enumerate(rows):
            use(model, name)
            found.append(next_token(token[i : i + 1], solo_caches[i]))
        return torch.cat(found)

    def generate(some):
        mask = torch.ones_like(some)
        return model.generate(
            input_ids=some, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None
        )

    def generate_solo():
        for i, name in enumerate(rows):
            use(model, name)
            generate(prompts[i : i + 1])

    times: dict[str, list[float]] = {}
    alone = solo()
    with mixed(model, rows):
        difference = (next_token(token, mixed_cache) - alone).abs().max().item()
    bare_caches = [cache(None, prompts[i : i + 1]) for i in range(asked.rows)]
    bare = torch.cat([next_token(token[i : i + 1], past) for i, past in enumerate(bare_caches)])
    of_the_base = (next_token(token, base_cache) - bare).abs().max().item()
    for _ in range(asked.rounds):
        times.setdefault("token, one at a time", []).append(seconds(solo))
        times.setdefault("generate, one at a time", []).append(seconds(generate_solo))
        with mixed(model, rows):
            times.setdefault("token, mixed batch", []).append(seconds(lambda: next_token(token, mixed_cache)))
            times.setdefault("generate, mixed batch", []).append(seconds(lambda: generate(prompts)))
        times.setdefault("token, base alone, same batch", []).append(seconds(lambda: next_token(token, base_cache)))
        times.setdefault("stacking a mixed batch", []).append(seconds(lambda: mixed(model, rows).__enter__()))
        times.setdefault("switching", []).append(seconds(lambda: use(model, names[0])))
    ms = {what: round(1000 * median(found), 3) for what, found in times.items()}
    own = [p for layer in shared_layers(model).values() for a in layer.adapters.values() for p in a.parameters()]
    adapter_bytes = sum(p.nbytes for p in own) - sum(
        p.nbytes for layer in shared_layers(model).values() for p in layer.base.parameters() for _ in layer.adapters
    )
    result = {
        **{key: value for key, value in vars(asked).items() if key != "json"},
        "largest_logit": alone.abs().max().item(),
        "largest_difference_mixed_from_alone": difference,
        "largest_difference_of_the_bare_base_batch_from_alone": of_the_base,
        "milliseconds": ms,
        "times_faster": {
            kind: round(ms[f"{kind}, one at a time"] / ms[f"{kind}, mixed batch"], 2) for kind in ("token", "generate")
        },
        "loading_one_adapter_ms": round(1000 * median(load), 1),
        "base_mb": round(base_bytes / 1e6, 2),
        "adapters_mb": round(adapter_bytes / 1e6, 2),
    }
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
