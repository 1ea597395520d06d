"""The quickstart: train, evaluate and merge a LoRA adapter with the three commands a user types (`make quickstart`).

Each command is printed before it runs. Finished steps are skipped; an unfinished training run resumes.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
ADAPTER = "out/quickstart"
MERGED = "out/quickstart-merged"
SCORES = "out/quickstart-eval.json"


def newer(path: str, than: str) -> bool:
    """Whether `path` exists and is newer than `than`. Each is the last file its command writes."""
    return (ROOT / path).is_file() and (ROOT / path).stat().st_mtime_ns >= (ROOT / than).stat().st_mtime_ns


def lora_ft(*arguments: str, capture: bool = False) -> str:
    """Run `lora-ft ARGUMENTS` in the repository and return its stdout if captured; exit with its code if it fails."""
    print(f"\n$ lora-ft {shlex.join(arguments)}", flush=True)
    command = [str(Path(sys.executable).parent / "lora-ft"), *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout or ""


def train() -> None:
    """Train the adapter, or resume its training."""
    if (ROOT / ADAPTER / "lora_ft.json").is_file():  # written last: the folder is complete
        print(f"\n{ADAPTER} contains a finished adapter: skipping training (remove the folder to train again)")
    elif (ROOT / ADAPTER / "checkpoints").is_dir():
        lora_ft("train", CONFIG, "--resume")
    else:
        lora_ft("train", CONFIG)


def evaluate() -> dict:
    """The scores of base and adapter, as `lora-ft eval --json` prints them."""
    if newer(SCORES, f"{ADAPTER}/lora_ft.json"):
        print(f"\n{SCORES} contains its scores: skipping evaluation")
    else:
        text = lora_ft("eval", ADAPTER, "--json", capture=True)
        json.loads(text)
        (ROOT / SCORES).write_text(text, encoding="utf-8")
    return json.loads((ROOT / SCORES).read_text(encoding="utf-8"))


def merge() -> None:
    """Merge the adapter into its base."""
    if newer(f"{MERGED}/lora_ft.json", f"{ADAPTER}/lora_ft.json"):
        print(f"\n{MERGED} contains the merged model: skipping the merge")
    else:
        shutil.rmtree(ROOT / MERGED, ignore_errors=True)  # merged from an older adapter
        lora_ft("merge", "--adapter", ADAPTER)


def summary(scores: dict) -> str:
    """The last lines: a table of scores, and where the files are."""
    lines = [f"On {scores['examples']} reviews it was not trained on:", f"{'':12}{'base':>10}{'adapter':>10}"]
    for key, spec in (("accuracy", ".1%"), ("macro_f1", ".3f"), ("loss", ".3f")):
        lines.append(f"  {key:10}{scores['base'][key]:>10{spec}}{scores['adapter'][key]:>10{spec}}")
    gain = scores["adapter"]["accuracy_vs_base"]  # of the same reviews, answered by both
    points, low, high = (f"{100 * value:+.1f}" for value in (gain["difference"], *gain["ci95"]))
    lines += [
        f"Gained: {points} points of accuracy (95% interval {low} to {high}): {gain['better']} reviews right that the base",
        f"has wrong, {gain['worse']} wrong that it has right (McNemar's exact test: p = {gain['p']:.2g}).",
        f"The adapter is in {ADAPTER} (PEFT's format), the merged model, checked against base + adapter, in {MERGED}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        train()
        result = evaluate()
        merge()
        print("\n" + summary(result))
    except KeyboardInterrupt:
        sys.exit(130)
