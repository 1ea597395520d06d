"""`lora-ft serve`'s engine: many clients at once against one at a time, the first token while a long prompt is read, the memory
of the adapters, and the longest time between two tokens of a stream, in turns with and without a load of another adapter.

    python benchmarks/serving.py MODEL [--adapters 8] [--clients 16] [--prompt 32] [--new 64] [--loads 5] [--json FILE]

Each client sends one request to one of the adapters, with a prompt of random tokens; answers are greedy and never end early.
"""

import argparse
import asyncio
import json
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from many_adapters import write_adapters
from transformers import AutoModelForCausalLM, GenerationConfig

from lora_ft.commands.generate.command import find_adapters
from lora_ft.commands.generate.serving import load
from lora_ft.commands.serve.adapters import load_lora_adapter, unload_lora_adapter
from lora_ft.commands.serve.bodies import LoadBody
from lora_ft.commands.serve.engine import Engine
from lora_ft.commands.serve.jobs import Finished, Job, Limits, Piece
from lora_ft.commands.serve.metrics import Metrics
from lora_ft.commands.serve.thread import started
from lora_ft.core.trust import NO_TRUST
from lora_ft.methods.lora.multi import shared_layers


class Client:
    """A request: when its first token came, and when it was complete."""

    def __init__(self, engine: Engine, adapter: str, tokens: int, new: int, draw: random.Random):
        config = GenerationConfig(do_sample=False, max_new_tokens=new)
        ids = [draw.randrange(100, 10_000) for _ in range(tokens)]
        self.times: list[float] = []  # of the tokens
        self.over, self.engine = threading.Event(), engine
        self.job = Job(adapter, ids, config, set(), lambda ids: "", self.tell, logprobs=0)

    def tell(self, event: object) -> None:
        """Note the times."""
        if isinstance(event, Piece):
            self.times.append(perf_counter())
        if isinstance(event, Finished):
            self.over.set()

    def send(self) -> "Client":
        """Ask."""
        self.sent = perf_counter()
        self.engine.submit([self.job])
        return self

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    def pause(self, start: float, end: float) -> float:
        """The longest time between two tokens, of those that `start` to `end` is a part of."""
        return max(b - a for a, b in pairwise(self.times) if b > start and a < end)


def main() -> None:
    """Measure and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, value in (("adapters", 8), ("clients", 16), ("prompt", 32), ("new", 64), ("long", 1000), ("loads", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names: list[str] = []

        def make() -> Engine:  # all that computes, in the engine's thread
            model = AutoModelForCausalLM.from_pretrained(asked.model)
            names.extend(write_adapters(model, Path(folder), asked.adapters + 1, 8, ["q", "v"]))
            named, base = find_adapters([], [f"{name}={folder}/{name}" for name in names[:-1]], asked.model)
            return Engine(load(named, base, raw=False, trust=NO_TRUST), Limits(rows=asked.clients), Metrics())

        engine, draw = started(make), random.Random(0)
        served, later = engine.served, names.pop()
        found = measure(asked, engine, names, draw) | pauses(asked.loads, engine, names[:4], Path(folder), later, draw)
    base_bytes = sum(p.nbytes for p in served.model.parameters())
    kinds = [a for layer in shared_layers(served.model).values() for a in layer.adapters.values()]
    own = sum(p.nbytes for layer in kinds for name, p in layer.named_parameters() if name.startswith("lora_"))
    found |= {"base_mb": round(base_bytes / 1e6, 1), "adapters_mb": round(own / 1e6, 1)}
    engine.stop()
    text = json.dumps(vars(asked) | found | {"json": None}, indent=1, default=str)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n")


def measure(asked: argparse.Namespace, engine: Engine, names: list[str], draw: random.Random) -> dict[str, float]:
    """Tokens a second of all clients, one at a time and at once; seconds to the first token of a short and a long prompt."""

    def clients() -> list[Client]:
        return [Client(engine, names[i % len(names)], asked.prompt, asked.new, draw) for i in range(asked.clients)]

    Client(engine, names[0], 8, 4, draw).send().over.wait()
    start = perf_counter()
    for client in clients():
        client.send().over.wait()
    alone = asked.clients * asked.new / (perf_counter() - start)
    start = perf_counter()
    for client in [client.send() for client in clients()]:
        client.over.wait()
    together = asked.clients * asked.new / (perf_counter() - start)
    long = Client(engine, names[0], asked.long, 4, draw).send()
    threading.Event().wait(0.5)  # it is being read
    short = Client(engine, names[1], 16, 4, draw).send()
    short.over.wait()
    long.over.wait()
    return {
        "tokens_per_second_alone": round(alone, 1),
        "tokens_per_second_together": round(together, 1),
        "ratio": round(together / alone, 2),
        "first_token_while_a_long_prompt_is_read": round(short.first, 3),
        "long_prompt_read": round(long.first, 3),
    }


def pauses(loads: int, engine: Engine, names: list[str], folder: Path, later: str, draw: random.Random) -> dict:
    """The longest time between two tokens of streams of `names`, in turns of 1.5 s without and with a load of `later`."""
    found: dict[str, list[float]] = {"pauses": [], "pauses_with_a_load": []}
    body, spans = LoadBody(lora_name="later", lora_path=later), []
    streams = [Client(engine, name, 8, 1500, draw).send() for name in names]
    threading.Event().wait(3)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as worker:
        for kind in [*found] * loads:
            start = perf_counter()
            if kind == "pauses_with_a_load":
                asyncio.run(load_lora_adapter(engine.served, engine, folder, body, set(), worker))
            threading.Event().wait(max(0.0, start + 1.5 - perf_counter()))
            spans.append((kind, start, perf_counter()))
            if kind == "pauses_with_a_load":
                asyncio.run(unload_lora_adapter(engine.served, engine, "later"))
            threading.Event().wait(0.5)  # so that no pause belongs to two turns
    for stream in streams:
        stream.job.gone = True
    for kind, start, end in spans:
        found[kind].append(round(max(stream.pause(start, end) for stream in streams), 3))
    return found


if __name__ == "__main__":
    main()
