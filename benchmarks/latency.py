"""Inference latency of trained runs beside their bare base, in turns: the LoRA paper's section 4.1 and its table 1.

    python benchmarks/latency.py OUT [--json FILE]

OUT is the output of a run, or of `lora-ft compare`: then the first run of each variant is measured, and the results go into
its compare.json and compare.html. Base and adapted model are in memory together, in eval mode, with one row of random ids,
whose values do not change the speed. LoRA is measured twice, as an adapter and merged.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lora_ft import merge
from lora_ft.commands.compare.command import PAGE, RESULT
from lora_ft.commands.compare.display import latency_tables
from lora_ft.commands.compare.page import page
from lora_ft.core.errors import FilesError
from lora_ft.core.storage import read_json, write_json
from lora_ft.methods.interface import METHODS, virtual_ids
from lora_ft.methods.trained import Trained
from lora_ft.model.device import prepare_device
from lora_ft.model.load import load_base
from lora_ft.report.render import write_page

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 16, 20


def main() -> None:
    """Measure one run or the variants of a comparison, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the latencies to FILE")
    options = parser.parse_args()
    path = options.out / RESULT
    compared = path.is_file()
    result = (
        read_json(path, FilesError) if compared else {"variants": [{"name": "run", "runs": {"0": str(options.out)}}]}
    )
    for variant in result["variants"]:
        for output in list(variant.get("runs", {}).values())[:1]:
            variant["latency"] = latency(Path(output))
            if compared:
                write_json(path, result)
                write_page(options.out / PAGE, page(result))
    for table in latency_tables(result):
        print("", *table.columns, sep="\t")
        for row in table.rows:
            print(row.name, *row.cells, sep="\t")
    if options.json:
        write_json(options.json, {v["name"]: v["latency"] for v in result["variants"] if "latency" in v})


def latency(folder: Path) -> dict:
    """The latency of a finished run: "adapter" and, of LoRA, "merged", each as `paired`; of: the hash of its weights."""
    trained = Trained.open(folder)
    config, base = trained.config, trained.base()
    assert config is not None, "not a run of lora-ft"
    device = prepare_device(config.trainer.use_cpu)
    bare = load_base(base, config.model.dtype, device).eval()
    weights = next(entry for name, entry in trained.record["files"].items() if name.endswith(".safetensors"))
    result: dict = {"of": weights["sha256"], "prompt_tokens": PROMPT_TOKENS}
    for form in ("adapter", "merged") if trained.method == "lora" else ("adapter",):
        model = load_base(base, config.model.dtype, device)
        METHODS[trained.method].load(model, trained)
        if form == "merged":
            merge(model)
        print(f"{folder}, {form}: {ROUNDS} rounds", flush=True)
        result[form] = paired(bare, model.eval())
        del model
    return result


def paired(base: PreTrainedModel, adapted: PreTrainedModel) -> dict[str, float]:
    """Milliseconds of a prompt and of each new token for both models, and the ratios adapted / base.

    Each round runs both, in alternating order. All figures are medians over the rounds; a ratio is the median of a round's.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.get_input_embeddings().num_embeddings, (1, PROMPT_TOKENS), generator=generator)
    ids = ids.to(base.device)
    virtual = torch.tensor([virtual_ids(adapted)], dtype=ids.dtype, device=ids.device)
    prompts = {"base": (base, ids), "adapted": (adapted, torch.cat([virtual, ids], dim=1))}
    seconds: dict[str, list[tuple[float, float]]] = {"base": [], "adapted": []}
    for n in range(ROUNDS + 1):
        for who in ("base", "adapted") if n % 2 else ("adapted", "base"):
            seconds[who].append(time_generation(*prompts[who]))
    rounds = list(zip(seconds["base"][1:], seconds["adapted"][1:], strict=True))  # the first one warms up
    result = {}
    for i, name in enumerate(("prompt", "token")):
        result[f"{name}_ms"] = round(1000 * statistics.median(b[i] for _, b in rounds), 2)
        result[f"base_{name}_ms"] = round(1000 * statistics.median(a[i] for a, _ in rounds), 2)
        result[f"{name}_ratio"] = round(statistics.median(b[i] / a[i] for a, b in rounds), 4)
    return result


@torch.no_grad()
def time_generation(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds for the prompt `ids` (1, length), and for each of NEW_TOKENS that are then generated greedily."""
    start = _clock(model)
    out = model(input_ids=ids, use_cache=True)
    after_prompt = _clock(model)
    for _ in range(NEW_TOKENS):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return after_prompt - start, (_clock(model) - after_prompt) / NEW_TOKENS


def _clock(model: PreTrainedModel) -> float:
    """The time in seconds, after all work on the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
