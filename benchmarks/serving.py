"""`lora-ft serve`'s engine: many clients at once against one at a time, and the first token while a long prompt is read.

    python benchmarks/serving.py MODEL [--adapters 8] [--clients 16] [--prompt 32] [--new 64] [--json FILE]

Each client sends one request to one of the adapters, with a prompt of random tokens; answers are greedy and never end early.
"""

import argparse
import json
import random
import tempfile
import threading
from pathlib import Path
from time import perf_counter

from many_adapters import write_adapters
from transformers import AutoModelForCausalLM, GenerationConfig

from lora_ft.commands.generate.command import find_adapters
from lora_ft.commands.generate.serving import load
from lora_ft.commands.serve.engine import Engine
from lora_ft.commands.serve.jobs import Finished, Job, Limits, Piece
from lora_ft.commands.serve.metrics import Metrics
from lora_ft.core.trust import NO_TRUST


class Client:
    """A request: when its first token came, and when it was complete."""

    def __init__(self, engine: Engine, adapter: str, tokens: int, new: int, draw: random.Random):
        config = GenerationConfig(do_sample=False, max_new_tokens=new)
        ids = [draw.randrange(100, 10_000) for _ in range(tokens)]
        self.first = self.last = 0.0
        self.over, self.engine = threading.Event(), engine
        self.job = Job(adapter, ids, config, set(), lambda ids: "", self.tell, logprobs=0)

    def tell(self, event: object) -> None:
        """Note the times."""
        self.last = perf_counter()
        if isinstance(event, Piece):
            self.first = self.first or self.last
        if isinstance(event, Finished):
            self.over.set()

    def send(self) -> "Client":
        """Ask."""
        self.sent = perf_counter()
        self.engine.submit([self.job])
        return self


def main() -> None:
    """Measure and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, value in (("adapters", 8), ("clients", 16), ("prompt", 32), ("new", 64), ("long", 1000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(asked.model)
        names = write_adapters(model, Path(folder), asked.adapters, 8, ["q", "v"])
        named, base = find_adapters([], [f"{name}={folder}/{name}" for name in names], asked.model)
        served = load(named, base, raw=False, trust=NO_TRUST)
    engine, draw = Engine(served, Limits(rows=asked.clients), Metrics()), random.Random(0)
    engine.start()

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
    found = {
        "tokens_per_second_alone": round(alone, 1),
        "tokens_per_second_together": round(together, 1),
        "ratio": round(together / alone, 2),
        "first_token_while_a_long_prompt_is_read": round(short.first - short.sent, 3),
        "long_prompt_read": round(long.first - long.sent, 3),
    }
    engine.stop()
    text = json.dumps(vars(asked) | found | {"json": None}, indent=1, default=str)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
