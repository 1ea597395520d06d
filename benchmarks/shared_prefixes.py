"""What sharing beginnings is worth: training steps and scoring with `train.share_prefixes` auto and off, in turns.

    python benchmarks/shared_prefixes.py [MODEL] [--rounds 5]

Prints a line of JSON per workload: seconds of each round both ways, the median of their ratios and its range, the tokens
computed, and how far the losses are apart. Random tokens: what they say has no part in the time they take.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import datasets
import torch

from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.evaluation.scoring import score
from lora_ft.methods.lora.inject import inject_lora, trainable
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base
from lora_ft.nn.attention import Isolation
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.training.step import add_gradients

ROW_TOKENS = 1024


def ids(count: int) -> list[int]:
    """Random token ids."""
    return [random.randrange(1000, 40_000) for _ in range(count)]


def around(mean: int) -> list[int]:
    """Ids of about `mean` tokens."""
    return ids(max(4, int(random.gauss(mean, mean / 3))))


def instruction() -> list[list[int]]:
    """An instruction of 300 tokens before rows of 30."""
    head = ids(300)
    return [head + ids(30) for _ in range(16)]


def chat() -> list[list[int]]:
    """A system prompt of 22 tokens, as SmolLM2's, before turns of about 60."""
    head = ids(22)
    return [head + around(60) for _ in range(16)]


def reviews() -> list[list[int]]:
    """Three tokens of a template before texts as long as SST-2's."""
    head = ids(3)
    return [head + around(26) for _ in range(16)]


def nothing() -> list[list[int]]:
    """Texts as long as SST-2's that begin differently."""
    return [around(26) for _ in range(16)]


def labels() -> list[dict]:
    """Six labels of 3 to 5 tokens after a text of 100."""
    words = [ids(n) for n in (3, 4, 5, 3, 4, 5)]
    return [row(ids(100), words[i % 6], words) for i in range(12)]


def documents() -> list[dict]:
    """Twenty questions of 20 tokens on each of two documents of 800, with answers of 5."""
    texts = [ids(800) for _ in range(2)]
    return [row(texts[i % 2] + ids(20), ids(5), []) for i in range(40)]


def row(prompt: list[int], completion: list[int], choices: list[list[int]]) -> dict:
    """An encoded example."""
    own = {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion, "choices": choices}
    own |= {"label": choices.index(completion) if choices else -1, "prompt_length": len(prompt), "where": ""}
    return own | {"tokens": len(prompt) + len(completion), "supervised": len(completion)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(2)
    random.seed(0)
    model = load_base(resolve(options.model), "auto", device="cpu")
    inject_lora(model, ["q", "v"], rank=8, alpha=16, seed=0)
    keep_gate_and_up(model)
    isolation = Isolation.detect(model, 1024)

    def train(examples: list[dict]) -> Callable[[bool], float]:
        dataset = datasets.Dataset.from_list(examples)

        def step(share: bool) -> float:
            model.train()
            for p in trainable(model).values():
                p.grad = None
            plan = StepPlan(dataset, len(dataset), 1, 1, RowPacking(ROW_TOKENS, share=share), 0)
            loss = add_gradients(model, isolation, plan[0], plan.shard, lambda: None)
            return float(loss) / plan[0]["total"]

        return step

    def evaluate(examples: list[dict]) -> Callable[[bool], float]:
        dataset = datasets.Dataset.from_list(examples)
        return lambda share: score(model, dataset, isolation, RowPacking(ROW_TOKENS, share=share)).metrics()["loss"]

    workloads = {
        make.__name__: train([row(s[:-4], s[-4:], []) for s in make()])
        for make in (instruction, chat, reviews, nothing)
    }
    workloads |= {make.__name__: evaluate(make()) for make in (labels, documents)}
    for name, run in workloads.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        losses: dict[bool, float] = {}
        for number in range(options.rounds + 1):
            for share in (number % 2 == 0, number % 2 == 1):  # which comes first takes turns too
                started = time.perf_counter()
                losses[share] = run(share)
                if number:  # the first is to warm up
                    seconds[share].append(time.perf_counter() - started)
        ratios = sorted(off / auto for off, auto in zip(seconds[False], seconds[True], strict=True))
        result = {
            "workload": name,
            "ratio": round(statistics.median(ratios), 2),
            "range": [round(ratios[0], 2), round(ratios[-1], 2)],
        }
        result |= {"seconds": {("off", "auto")[k]: [round(s, 3) for s in v] for k, v in seconds.items()}}
        print(json.dumps(result | {"losses_apart": abs(losses[True] - losses[False])}), flush=True)


if __name__ == "__main__":
    main()
