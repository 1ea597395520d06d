"""How lora-ft's step spends its time: `python benchmarks/profile_step.py [--workload text] [--steps 2]`.

Runs torch's profiler over steps of the benchmark's lora-ft row and prints seconds per step for each kind of operation. The
profiler adds about a tenth to the time. Recording input shapes, which would separate the head's products from the others, would
double it.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

from rows import run
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from workloads import WORKLOADS, add_sources, make_model, write_data


class Profiled(TrainerCallback):
    """Profiles the last `steps` steps of a run."""

    def __init__(self, steps: int):
        self.steps = steps
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == state.max_steps - self.steps:
            self.profile.start()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == state.max_steps:
            self.profile.stop()


def kind_of(name: str) -> str:
    """The group that an operation is counted in."""
    if "attention" in name:
        return "attention"
    if name.rstrip("_") in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "matrix products"
    if "softmax" in name or "scatter" in name or "gather" in name:
        return "loss"
    return name.removeprefix("aten::").rstrip("_")


def main() -> None:
    """Profile and print a line per kind of operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--workload", default="text", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    profiled = Profiled(options.steps)
    with tempfile.TemporaryDirectory() as name:
        make_model(options.model, options.smollm2, Path(name))
        write_data(options.workload, options.sst2, options.e2e, Path(name))
        run("lora-ft", options.workload, options.model, Path(name), options.steps, [profiled])
    seconds: dict[str, float] = defaultdict(float)
    for event in profiled.profile.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / options.steps
    total = sum(seconds.values())
    for kind, s in sorted(seconds.items(), key=lambda item: -item[1]):
        if s >= 0.005 * total:
            print(f"{kind:26} {s:6.2f} s  {s / total:4.0%}")
    print(f"{'total':26} {total:6.2f} s")


if __name__ == "__main__":
    main()
