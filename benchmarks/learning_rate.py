"""`train.learning_rate: auto` against a grid of eight rates, each trained to its end, on six tasks.

    python benchmarks/learning_rate.py [--tasks sst2,e2e,reviews,text,reversed,condition] [--seeds 0,1,2] [--rates 0.001,0.002]

Prints a line of JSON per task: the eval losses with each rate and with `auto`, one a seed, how much more the mean of `auto`
is than the least mean of the grid, the rates it chose, what the trials scored, and how long a command took, in times of a run
of the grid (which are trained together). A seed draws the order, the adapter, and the rows where there are more than are used.
The eval data, which chooses nothing, is the data's own. The reviews are those of `make assets`.
"""

import argparse
import json
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from workloads import add_sources, write_data

RATES = (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
LABELS = {"completion": " {label}", "label_names": {"label": ["negative", "positive"]}, "max_length": 128}
REVIEW = LABELS | {"prompt": "Review: {sentence}\nSentiment:"}
E2E = {"train": "e2e.jsonl", "eval": "e2e_eval.jsonl", "max_train_examples": 480, "max_length": 256}
REVIEWS = {
    "train": "reviews_train.jsonl",
    "eval": "reviews_eval.jsonl",
    "max_train_examples": 400,
    "max_eval_examples": 200,
}
REVIEWS |= {"truncate": "start", "max_length": 128}
TASKS: dict[str, dict] = {  # name -> its `data`
    "sst2": {"train": "sst2.jsonl", "eval": "sst2_eval.jsonl", "max_train_examples": 1000, "max_eval_examples": 400}
    | REVIEW,
    "e2e": E2E | {"prompt": "{input}\n", "completion": "{output}"},
    "reviews": REVIEWS | LABELS | {"prompt": "Review: {review}\nSentiment:"},
    "text": {"train": "text.jsonl", "eval": "text_eval.jsonl", "max_train_examples": 320, "max_length": 96}
    | {"text": "{text}"},
    "reversed": E2E | {"prompt": "{output}\n", "completion": "{input}"},
    "condition": REVIEWS | {"prompt": "Review: {review}\nCondition:", "completion": " {condition}"},
}
BATCH = 8


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(options: argparse.Namespace, folder: Path) -> None:
    """Write the rows of all tasks to FOLDER, and a link to the model."""
    (folder / "model").symlink_to(options.smollm2.resolve())
    for workload, task, file in (("sst2", "sst2", "dev.tsv"), ("e2e_qv", "e2e", "valid.txt")):
        for name, sst2, e2e in (
            (f"{task}_eval", options.sst2.with_name(file), options.e2e.with_name(file)),
            (task, options.sst2, options.e2e),
        ):
            write_data(workload, sst2, e2e, folder)
            (folder / f"{workload}.jsonl").rename(folder / f"{name}.jsonl")
    lines = (folder / "e2e_eval.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (folder / "e2e_eval.jsonl").write_text("".join(lines[:150]))
    for part in ("train", "eval"):
        (folder / f"reviews_{part}.jsonl").symlink_to((options.reviews / f"reviews_{part}.jsonl").resolve())
    words = " ".join(text for _, text in sorted(pydoc_data.topics.topics.items())).split()
    texts = [{"text": " ".join(words[i : i + 55])} for i in range(0, len(words), 55)]
    random.Random(0).shuffle(texts)
    write_rows(folder / "text_eval.jsonl", texts[:80])
    write_rows(folder / "text.jsonl", texts[80:])


def write_config(folder: Path, task: str, rate: float | str, seed: int) -> str:
    """Write the config of a run, which evaluates its last step; its name."""
    steps = TASKS[task]["max_train_examples"] // BATCH
    train = {"batch_size": BATCH, "learning_rate": rate, "seed": seed, "eval_steps": steps, "save_steps": steps}
    config = {
        "model": {"name": "model"},
        "adapter": {"rank": 8, "alpha": 16, "targets": ["q", "v"]},
        "data": TASKS[task],
        "train": train | {"evaluate_base": False, "report_to": []},
        "output": f"{task}-{rate}-{seed}",
    }
    (folder / f"{task}-{rate}-{seed}.yaml").write_text(yaml.safe_dump(config))
    return f"{task}-{rate}-{seed}.yaml"


def train(folder: Path, names: list[str]) -> float:
    """Seconds that `lora-ft train NAMES` takes in FOLDER."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lora_ft", "train", *names], cwd=folder, check=True)
    return time.perf_counter() - started


def compare(folder: Path, task: str, rates: list[float], seeds: list[int]) -> dict:
    """The losses of the grid and of `auto`."""
    losses: dict[float | str, list[float]] = {rate: [] for rate in (*rates, "auto")}
    chosen, tried, times = [], [], []
    for seed in seeds:
        seconds = train(folder, [write_config(folder, task, rate, seed) for rate in rates])
        auto_seconds = train(folder, [write_config(folder, task, "auto", seed)])
        records = {rate: json.loads((folder / f"{task}-{rate}-{seed}/lora_ft.json").read_text()) for rate in losses}
        for rate, record in records.items():
            losses[rate].append(round(record["metrics"]["loss"], 4))
        chosen.append(records["auto"]["config"]["train"]["learning_rate"])
        tried.append({trial["learning_rate"]: trial["loss"] for trial in records["auto"]["learning_rate"]["tried"]})
        times.append(round(auto_seconds / (seconds / len(rates)), 2))
    means = {rate: statistics.mean(of_seeds) for rate, of_seeds in losses.items()}
    above = means["auto"] / min(means[rate] for rate in rates) - 1
    facts = {"task": task, "losses": losses, "above_the_grid": round(above, 4), "chosen": chosen}
    return facts | {"tried": tried, "times_a_run": times}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--reviews", type=Path, default="data", help="the folder of reviews_train.jsonl")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    options = parser.parse_args()
    rates, seeds = [*map(float, options.rates.split(","))], [*map(int, options.seeds.split(","))]
    with tempfile.TemporaryDirectory() as name:
        write_tasks(options, Path(name))
        for task in options.tasks.split(","):
            print(json.dumps(compare(Path(name), task, rates, seeds)), flush=True)


if __name__ == "__main__":
    main()
