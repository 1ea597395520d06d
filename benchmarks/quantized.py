"""A step on a base in float32, int8 and nf4: its time, and the bytes of the blocks' weights.

    python benchmarks/quantized.py models/smollm2-135m-instruct [--pairs 8] [--threads 2]

A step is one micro-batch of 1,024 tokens (8 examples of 128, 64 tokens supervised), forward and backward, with LoRA of rank 8
on q and v. The three take turns, so that changes in the machine's load affect all of them; ratios are of steps of one turn.
"""

import argparse
import statistics
import time

import torch

from lora_ft.methods.lora.inject import inject_lora
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base
from lora_ft.model.quantize import quantizable
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import supervised_loss
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.nn.quantized import QuantizedLinear
from lora_ft.nn.rows import Segment

EXAMPLES, LENGTH, SUPERVISED = 8, 128, 8
FORMS = (None, "int8", "nf4")


def main() -> None:
    """Time the steps, and print a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    models = {form: load_base(resolve(options.model), "float32", quantization=form) for form in FORMS}
    sizes = {form: size_of_blocks(model) for form, model in models.items()}
    for model in models.values():
        inject_lora(model, ["q", "v"], 8, seed=0)
        keep_gate_and_up(model)
        step(model)
    times = [{form: step(model) for form, model in models.items()} for _ in range(options.pairs)]
    for form in FORMS:
        seconds = statistics.median(turn[form] for turn in times)
        ratios = sorted(turn[form] / turn[None] for turn in times)
        print(
            f"{form or 'float32':8} {seconds:6.2f} s, {statistics.median(ratios):.3f} of float32's ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}); the blocks' weights {sizes[form] / 2**20:,.0f} MiB, {sizes[form] / sizes[None]:.3f}"
        )


def size_of_blocks(model: torch.nn.Module) -> int:
    """The bytes of the linear weights of the blocks."""
    quantized = [b.nbytes for m in model.modules() if isinstance(m, QuantizedLinear) for b in m.buffers()]
    return sum(quantized) or sum(module.weight.nbytes for module in quantizable(model).values())


def step(model: torch.nn.Module) -> float:
    """The seconds of a forward and a backward pass."""
    ids = torch.randint(100, 1000, (1, EXAMPLES * LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).repeat(EXAMPLES)[None]
    keep = (torch.arange(EXAMPLES)[:, None] * LENGTH + torch.arange(LENGTH - SUPERVISED, LENGTH)).flatten()
    isolation = Isolation.guess_from_config(model, LENGTH)
    started = time.perf_counter()
    with isolation.row(model.train(), [Segment(LENGTH)] * EXAMPLES):
        supervised_loss(model, ids, positions, keep, ids[0, keep]).backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
