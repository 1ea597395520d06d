"""Speed and memory against PEFT + Trainer and against the machine's floor: `make bench`.

    python benchmarks/bench.py [--workloads sst2,e2e_qv,e2e_all,text] [--rounds 3] [--steps 12] [--sst2 TSV] [--e2e TXT]

Every row is a process of its own that trains the same examples, `--steps` steps after two for warming up, and rows take turns
round by round, so that the machine's drift hits all alike. Ratios are medians of pairs within a round, with their range.

    lora-ft    the tool's own path
    peft       PEFT + Trainer, dynamic padding, the same batches in the same order
    grouped    PEFT + Trainer, length-grouped batches of the same examples
    full       full fine-tuning with lora-ft's engine: what LoRA itself saves
    floor      the frozen layers' products alone (X W^T and dY W, and the head at the supervised positions), nothing else

The mean losses of lora-ft and peft must agree to 1e-3, else the row is void. Results go to benchmarks/results.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
WORKLOADS = {
    "sst2": dict(batch=16, rank=8, targets=["q", "v"]),
    "e2e_qv": dict(batch=8, rank=4, targets=["q", "v"]),
    "e2e_all": dict(batch=8, rank=16, targets=["q", "k", "v", "o", "gate", "up", "down"]),
    "text": dict(batch=4, rank=16, targets=["q", "k", "v", "o", "gate", "up", "down"]),
}
ROWS = ("lora-ft", "peft", "grouped", "full", "floor")
WARM = 2


def config_of(options, workload: str, folder: Path):
    """The workload's settings and data as a config of the tool."""
    from lora_ft.config import parse_config

    w = WORKLOADS[workload]
    data: dict = {"max_train_examples": w["batch"] * (options.steps + WARM), "train": str(folder / "data.jsonl")}
    if workload == "sst2":
        data |= {"train": options.sst2, "prompt": "Review: {sentence}\nSentiment:", "completion": " {label}"}
        data |= {"label_names": {"label": ["negative", "positive"]}, "max_length": 128}
    elif workload == "text":
        data |= {"text": "{text}", "max_length": 512}
    else:
        data |= {"prompt": "{input}\n", "completion": "{output}", "max_length": 256}
    return parse_config(
        {
            "model": {"name": options.model},
            "adapter": {"rank": w["rank"], "alpha": 2 * w["rank"], "targets": w["targets"]},
            "data": data,
            "train": {"batch_size": w["batch"], "learning_rate": 2e-4},
        }
    )


def write_data(options, workload: str, path: Path) -> None:
    lines = Path(options.e2e).read_text().splitlines()
    if workload == "text":  # rows of over 512 tokens, every token supervised
        rows = [{"text": "\n".join(lines[i : i + 16])} for i in range(0, len(lines) - 16, 16)]
    else:
        rows = [dict(zip(("input", "output"), line.split("||"), strict=True)) for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_row(row: str, workload: str, options) -> dict:
    """Train (or multiply) in this process; seconds a step, real tokens, mean loss, peak memory in MiB."""
    import torch
    from transformers import TrainerCallback, TrainingArguments

    from lora_ft.adapter.inject import inject_lora, lora_layers, trainable
    from lora_ft.attention import Packing
    from lora_ft.base import resolve
    from lora_ft.data.batches import Cut, Plan
    from lora_ft.data.prepare import prepare
    from lora_ft.device import MICRO_BATCH_TOKENS
    from lora_ft.model import load_base, load_tokenizer
    from lora_ft.progress import peak_memory_mb
    from lora_ft.trainer import LoRATrainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(options.folder)
    config = config_of(options, workload, folder)
    base, adapter = resolve(config.model.name), config.adapter
    data = prepare(config.data, load_tokenizer(base), 0)[0].dataset
    torch.set_flush_denormal(row in ("lora-ft", "full"))
    steps = options.steps + WARM
    plan = Plan(data, config.train.batch_size, 1, steps, Cut(MICRO_BATCH_TOKENS[device]), 0)
    tokens = sum(data[i]["tokens"] for s in range(WARM, steps) for i in plan.examples(s))
    model = load_base(base, "auto", device=device)
    if row == "floor":
        return floor(model, plan, steps, tokens, torch)

    stamps: list[float] = []

    class Stamps(TrainerCallback):
        def on_step_end(self, *_, **__):
            if device == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    settings = dict(
        output_dir=str(folder / "run"), use_cpu=device == "cpu", learning_rate=2e-4, warmup_steps=0, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, max_steps=steps,
    )  # fmt: skip
    if row in ("lora-ft", "full"):
        lines: list[dict] = []
        inject_lora(model, adapter.targets, adapter.rank, adapter.alpha, seed=0)
        if row == "full":  # the same engine, every weight of the base trained, no adapter
            for layer in lora_layers(model).values():
                layer.enabled = False
            model.requires_grad_(True)
            for p in trainable(model).values():
                p.requires_grad_(False)
        trainer = LoRATrainer(
            model, TrainingArguments(**settings, per_device_train_batch_size=1), plan,
            Packing.of(model, 512), None, lambda *_: None, lines.append,
        )  # fmt: skip
        trainer.add_callback(Stamps())
        trainer.train_from(None)
        losses = [line["loss"] for line in lines]
    else:
        from peft import LoraConfig, get_peft_model
        from peft_trainer import Collator
        from torch.utils.data import SequentialSampler
        from transformers import Trainer

        inject_lora(model, adapter.targets, adapter.rank, adapter.alpha, seed=0)  # for the same initial A
        starts = {path: next(iter(layer.lora_A.values())).data for path, layer in lora_layers(model).items()}
        for path, layer in lora_layers(model).items():
            model.set_submodule(path, layer.base)
        theirs = get_peft_model(
            model,
            LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                target_modules=[f"{r}_proj" for r in adapter.targets],
                task_type="CAUSAL_LM",
            ),
        )
        for path, A in starts.items():
            theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(A)
        order = data.select([i for s in range(steps) for i in plan.examples(s)])

        class InOrder(Trainer):
            def _get_train_sampler(self, dataset=None):
                return SequentialSampler(self.train_dataset) if row == "peft" else super()._get_train_sampler(dataset)

        trainer = InOrder(
            model=theirs,
            args=TrainingArguments(
                **settings,
                per_device_train_batch_size=config.train.batch_size,
                train_sampling_strategy="group_by_length" if row == "grouped" else "random",
            ),
            train_dataset=order.select_columns(["input_ids", "labels"]),
            data_collator=Collator(0),
        )
        trainer.add_callback(Stamps())
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seconds = (stamps[-1] - stamps[WARM - 1]) / options.steps
    if row == "grouped":  # other batches: its own real tokens would need its order; one epoch's mean is the same
        tokens = sum(data["tokens"]) * options.steps / steps
    return {
        "tokens_per_second": tokens / options.steps / seconds,
        "loss": statistics.mean(losses),
        "peak_mb": peak_memory_mb(torch.device(device)),
    }


def floor(model, plan, steps: int, tokens: int, torch) -> dict:
    """The products that no engine with a frozen base can do without, at each step's shapes."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    spent = 0.0
    with torch.no_grad():
        for s in range(steps):
            begun = time.perf_counter()
            for micro in plan[s]["micro"]:
                shapes = [(w, micro["input_ids"].shape[1]) for w in weights] + [(head.weight, len(micro["keep"]))]
                for w, n in shapes:
                    torch.nn.functional.linear(w.new_ones(n, w.shape[1]), w) @ w
            spent += (time.perf_counter() - begun) if s >= WARM else 0.0
    return {"tokens_per_second": tokens / spent, "loss": None, "peak_mb": None}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--sst2", default="../shared/data/sst2/train.tsv")
    parser.add_argument("--e2e", default="../shared/data/e2e/train.txt")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(run_row(options.row, options.workloads, options)))
        return
    results: dict = {}
    for workload in options.workloads.split(","):
        found: dict[str, list[dict]] = {row: [] for row in options.rows.split(",")}
        with tempfile.TemporaryDirectory() as folder:
            if workload != "sst2":
                write_data(options, workload, Path(folder) / "data.jsonl")
            for n in range(options.rounds):
                for row in found:
                    command = [sys.executable, __file__, "--row", row, "--folder", folder, "--workloads", workload]
                    command += ["--model", options.model, "--sst2", options.sst2, "--e2e", options.e2e]
                    command += ["--steps", str(options.steps)]
                    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd())
                    if done.returncode:
                        sys.exit(f"{workload} {row}: {done.stderr[-2000:]}")
                    found[row].append(json.loads(done.stdout.splitlines()[-1]))
                    print(f"{workload} round {n + 1} {row:8} {found[row][-1]}", flush=True)
        results[workload] = found
        report(workload, found)
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def report(workload: str, found: dict[str, list[dict]]) -> None:
    ours = found["lora-ft"]
    if "peft" in found:
        apart = abs(statistics.mean(r["loss"] for r in ours) - statistics.mean(r["loss"] for r in found["peft"]))
        print(f"{workload}: losses of lora-ft and peft differ by {apart:.1e}" + (": VOID" if apart > 1e-3 else ""))
    for row, theirs in found.items():
        speed = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True)]
        rate = statistics.median(r["tokens_per_second"] for r in theirs)
        line = f"{workload}: {row:8} {rate:7.0f} tokens/s; lora-ft is {spread(speed)} of it"
        if theirs[0]["peak_mb"]:
            memory = [a["peak_mb"] / b["peak_mb"] for a, b in zip(ours, theirs, strict=True)]
            line += f"; peak {theirs[0]['peak_mb']:.0f} MiB, ratio {spread(memory)}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
