"""Write docs/claims.md from the result files in benchmarks/: `python scripts/claims.py`. A test keeps the page up to date."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from lora_ft.commands.compare.display import format_mean
from lora_ft.core.metrics import format_metric

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "claims.md"
PAPER = "[Hu et al. 2021](https://arxiv.org/abs/2106.09685)"

HEAD = f"""# LoRA's claims, measured

The claims of {PAPER}, a command that tests each on your own model and data, and its
result for SmolLM2-135M-Instruct in float32 on 2 CPU cores. The paper's largest model has 1,300 times as many parameters. All
figures are read from the files in [`benchmarks/`](../benchmarks) that these commands wrote (`python scripts/claims.py`).

"""

ABLATION = "--seeds 0,1 --set data.max_train_examples=1000"


class Claim(NamedTuple):
    """A section of the page: its title, what the paper reports, the command that measures it, and the result."""

    title: str
    paper: str
    command: str
    result: str


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))


def page() -> str:
    """The content of docs/claims.md."""
    claims = [f() for f in (parameters, memory, speed, latency, quality, texts, ranks, targets, several_adapters)]
    return HEAD + "\n".join(
        f"## {c.title}\n\nPaper: {c.paper}\n\n```\n{c.command}\n```\n\n{c.result}\n" for c in claims
    )


def read(name: str) -> dict:
    """The content of benchmarks/NAME.json."""
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def variants(name: str) -> dict[str, dict]:
    """The trained variants of a comparison, by name."""
    return {v["name"]: v for v in read(name)["variants"] if "metrics" in v}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def parameters() -> Claim:
    rows = []
    for rank in (4, 1):
        shape = read(f"gpt3_r{rank}")
        rows.append(
            [
                f"GPT-3 175B, r = {rank}",
                f"{shape['trainable_parameters']:,}",
                f"{shape['base_parameters']:,}",
                f"{shape['base_parameters'] / shape['trainable_parameters']:,.0f}",
                f"{shape['adapter_bytes'] / 1e6:,.0f} MB",
            ]
        )
    sst2 = variants("compare_sst2")
    ratio = sst2["full"]["bytes_on_disk"] / sst2["lora"]["bytes_on_disk"]
    return Claim(
        "10,000 times fewer trainable parameters, and a smaller checkpoint",
        "GPT-3 175B with r = 4 on q and v: 10,000 times fewer parameters; a checkpoint of 35 MB (float16) instead of 350 GB.",
        "lora-ft check --shape gpt3-175b --set adapter.rank=4",
        "Confirmed, by counting:\n\n"
        + table(["", "trainable", "parameters", "times fewer", "adapter, float32"], rows)
        + f"\n\nThe ratio is lower on a small model: {sst2['lora']['trainable_parameters']:,} "
        f"({sst2['lora']['trainable_share']:.2%}) of SmolLM2-135M at r = 8, and {ratio:,.0f} times smaller on disk.",
    )


def memory() -> Claim:
    shape = read("gpt3_r4")["memory"]
    lora, full = (shape[method]["total"] / 2**30 for method in ("lora", "full"))
    sst2 = variants("compare_sst2")
    peaks = {name: sst2[name]["peak_memory_mb"] for name in ("lora", "full")}
    return Claim(
        "A third of the memory",
        "GPT-3 175B with Adam: 350 GB instead of 1.2 TB.",
        "lora-ft check --shape gpt3-175b --set adapter.rank=4",
        f"Estimated: {lora:,.0f} GiB instead of {full:,.0f} for a row of 512 tokens (base in half precision; float32 master "
        f"weights for full fine-tuning). Measured on SmolLM2, including the runtime: a peak of {peaks['lora']:,.0f} MiB "
        f"instead of {peaks['full']:,.0f}, a ratio of {peaks['lora'] / peaks['full']:.2f}.",
    )


def speed() -> Claim:
    rows = []
    for piece, result in read("results")["pieces"].items():
        lora, full = (
            {r["round"]: r["tokens_per_second"] for r in result["rows"].get(row, ())} for row in ("lora-ft", "full")
        )
        if both := lora.keys() & full.keys():
            ratio = statistics.median(lora[n] / full[n] for n in both)
            speeds = (f"{statistics.median(row[n] for n in both):.0f}" for row in (lora, full))
            rows.append([piece, *speeds, f"{ratio:.2f}"])
    return Claim(
        "Faster training",
        "25% more tokens per second than full fine-tuning on GPT-3 175B.",
        "make bench",
        "Confirmed for q and v, which the paper adapts; less with all projections adapted (e2e_all, text). Real tokens "
        "per second of both methods with lora-ft's training loop, so the difference is LoRA's:\n\n"
        + table(["model and workload", "LoRA", "full fine-tuning", "ratio"], rows),
    )


def latency() -> Claim:
    rows = []
    for name, variant in variants("compare_sst2").items():
        for form in ("merged", "adapter"):
            if ratios := variant["latency"].get(form):
                title = f"{name}, merged" if form == "merged" else f"{name}, not merged" if name == "lora" else name
                rows.append([title, f"{ratios['prompt_ratio']:.3f}", f"{ratios['token_ratio']:.3f}"])
    return Claim(
        "No additional inference latency",
        "none for merged LoRA; up to 20 to 30% for adapter layers on short inputs at batch size 1.",
        "lora-ft compare configs/compare_sst2.yaml --vary adapter.method=lora,full,bottleneck,prompt\n"
        "python benchmarks/latency.py out/sst2-compare",
        "Latency relative to the base's, for one row, measured in turns (medians of 20 rounds):\n\n"
        + table(["", "a prompt of 64 tokens", "each new token"], rows),
    )


def quality() -> Claim:
    base = read("compare_sst2")["base"]
    rows = [["base", "", f"{base['dev']['accuracy']:.1%}", "", "", f"{base['reviews']['accuracy']:.1%}"]]
    for name, variant in variants("compare_sst2").items():
        rows.append(
            [
                name,
                variant["tuned"]["train.learning_rate"],
                format_mean("accuracy", variant["metrics"]["dev"]["accuracy"]),
                f"{variant['trainable_parameters']:,}",
                f"{variant['seconds_per_step']:.2f}",
                format_mean("accuracy", variant["metrics"]["reviews"]["accuracy"]),
            ]
        )
    head = [
        "SST-2, 2,000 sentences",
        "learning rate",
        "dev accuracy",
        "trainable",
        "s/step",
        "accuracy on drug reviews",
    ]
    return Claim(
        "Quality on par with full fine-tuning, and better than adapter layers and prompt tuning",
        "on par with or better than full fine-tuning on RoBERTa, DeBERTa, GPT-2 and GPT-3.",
        "lora-ft compare configs/compare_sst2.yaml --vary adapter.method=lora,full,bottleneck,prompt --seeds 0,1,2 \\\n"
        "    --tune train.learning_rate=5e-5,1e-3,2e-2 --tune-steps 40",
        "Mean of the seeds, and half of its 95% interval. The interval from the 872 dev sentences alone is 2.3 points either "
        "way. The last column is the same task in another domain, 161 short drug reviews (6 points either way): it shows what "
        "was forgotten. Two threads; the tuning runs shared the machine, the timed runs did not.\n\n"
        f"{table(head, rows)}\n\nOn par with full fine-tuning: the intervals overlap. With so few seeds and sentences, "
        "LoRA cannot be distinguished from adapter layers or prompt tuning, so an advantage over them is not shown. On the "
        "drug reviews no method gains or loses more than chance explains.",
    )


def texts() -> Claim:
    names = ("bleu", "rouge_l", "loss")
    base = read("compare_e2e")["base"][""]
    rows = [["base", "", *(format_metric(name, base[name]) for name in names if name in base)]]
    for name, variant in variants("compare_e2e").items():
        scores = variant["metrics"][""]
        rows.append([name, variant["tuned"]["train.learning_rate"], *(each_seed(m, scores[m]) for m in names)])
    return Claim(
        "The same for generated texts",
        "GPT-2 medium on all of E2E: 70.4 BLEU with LoRA, 68.2 with full fine-tuning.",
        "lora-ft compare configs/compare_e2e.yaml --vary adapter.method=lora,full,bottleneck,prompt \\\n"
        "    --seeds 0,1 --tune train.learning_rate=5e-5,2e-4,1e-3,4e-3,2e-2 --tune-steps 20",
        "After 400 of the 42,061 sentences, far from a fully trained model. Greedy texts for 60 meanings of the test set. Mean "
        "of two seeds, and each seed.\n\n"
        + table(["E2E", "learning rate", "BLEU", "ROUGE-L", "loss"], rows)
        + "\n\nNot confirmed here: full fine-tuning and adapter layers (19 times the parameters) have the lower loss with both "
        "seeds; the BLEU of 60 texts does not separate the three. Prompt tuning is far behind; its learning rate is the "
        "largest of those tried.",
    )


def ranks() -> Claim:
    return Claim(
        "A very small rank suffices",
        "GPT-3 on WikiSQL and MultiNLI: r = 1 on q and v as good as r = 64.",
        f"lora-ft compare configs/compare_sst2.yaml --vary adapter.rank=1,2,4,8,16,64 --output out/ranks \\\n    {ABLATION}",
        "1,000 sentences of SST-2, the same alpha and learning rate for all ranks, as in the paper. Mean of two seeds, and "
        "each seed.\n\n"
        + ablation("rank_sst2", "r")
        + "\n\nConfirmed: the seeds differ more than the ranks. A step takes at most a tenth longer at r = 64.",
    )


def targets() -> Claim:
    return Claim(
        "q and v together rather than one of them",
        "at the same number of parameters on WikiSQL, 70.4 for q, 73.0 for v, 73.7 for both, 73.7 for q, k, v, o.",
        "lora-ft compare configs/compare_sst2.yaml --vary 'adapter.targets=[q],[v],[q,v],attention,all' "
        f"--output out/targets \\\n    {ABLATION}",
        "As above, at r = 8. Unlike in the paper, the numbers of trainable parameters differ.\n\n"
        + ablation("targets_sst2", "targets")
        + "\n\nPartly confirmed: q alone is worst with both seeds; v alone, or more than q and v, cannot be distinguished from "
        "q and v here.",
    )


def ablation(name: str, setting: str) -> str:
    """The table of a comparison that varies one setting of the SST-2 run."""
    rows = []
    for variant in variants(name).values():
        dev = variant["metrics"]["dev"]
        rows.append(
            [
                next(iter(variant["settings"].values())),
                f"{variant['trainable_parameters']:,}",
                each_seed("accuracy", dev["accuracy"]),
                each_seed("loss", dev["loss"]),
                f"{variant['seconds_per_step']:.2f}",
            ]
        )
    return table([setting, "trainable", "dev accuracy", "dev loss", "s/step"], rows)


def each_seed(metric: str, scores: dict) -> str:
    """`85.0% (84.4%, 85.6%)`: the mean and both values; an interval of two seeds would say less."""
    return f"{format_metric(metric, scores['mean'])} ({', '.join(format_metric(metric, v) for v in scores['values'])})"


def several_adapters() -> Claim:
    result = read("many_adapters")
    ms, times, count = result["milliseconds"], result["times_faster"], result["adapters"]
    return Claim(
        "Several adapters on one base, switched at no cost",
        "a task is switched by subtracting one B A and adding another.",
        "python benchmarks/many_adapters.py models/smollm2-135m-instruct",
        f"Switching takes {ms['switching']:.1f} ms and loading an adapter {result['loading_one_adapter_ms']:.0f} ms. The base "
        f"takes {result['base_mb']:.0f} MB, {count} adapters {result['adapters_mb']:.0f} MB. Compared with one row at a "
        f"time, a batch of {result['rows']} rows with {count} adapters is {times['token']:.1f} times faster for the next token "
        f"and {times['generate']:.1f} times faster with its prompt.",
    )


if __name__ == "__main__":
    main()
