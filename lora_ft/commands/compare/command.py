"""`lora-ft compare`: train the variants, each tuned alike and on every seed, measure, and show. Imports no torch by itself."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_ft.commands.compare.page import PAGE, write_page
from lora_ft.commands.compare.runs import Refused, Runner
from lora_ft.commands.compare.show import show
from lora_ft.commands.compare.summary import Found, base_metrics
from lora_ft.commands.compare.variants import (
    TUNED_ON,
    Axis,
    Variant,
    axis,
    chosen_metric,
    final,
    folder_name,
    points,
    tuning,
    tuning_metric,
    variants,
)
from lora_ft.core.errors import ConfigError, FilesError, NumbersError
from lora_ft.core.messages import info, silence_libraries
from lora_ft.core.run_folder import checkpoints
from lora_ft.core.storage import read_json, write_json
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.training.output import remove_checkpoint

RESULT = "compare.json"


def compare_command(
    path: Path,
    *,
    vary: Sequence[str],
    seeds: str = "0",
    tune: Sequence[str] = (),
    tune_steps: int | None = None,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    with_latency: bool = True,
    as_json: bool = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Compare the variants of a config; a table, compare.json and compare.html in `output`.

    Raises:
        UserError: the config, or a variant of it, is wrong.
        SystemExit: a run failed, or was stopped, or none could be done; with its exit code.
    """
    axes, grid = [axis("--vary", text) for text in vary], [axis("--tune", text) for text in tune]
    if shared := {a.key for a in axes} & {a.key for a in grid}:
        raise ConfigError(f"--tune {shared.pop()}: is varied; a setting is either")
    numbers = seed_numbers(seeds)
    every = variants(path, overrides, axes)
    folder = output or Path(f"{every[0].config.output.rstrip('/')}-compare")
    for variant in every:  # what is wrong with any is said before anything is spent
        for point in points(grid):
            tuning(variant, point, numbers[0], folder, tune_steps)
            final(variant, point, numbers[0], folder, False)
    options = ["--trust-remote-code"] * trust.remote_code + ["--allow-pickle"] * trust.pickles
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json(folder / RESULT, FilesError) if (folder / RESULT).is_file() else {}
    if before and before.get("made_by") != "lora-ft":
        raise FilesError(f"{folder / RESULT}: not of this tool. Name another folder: --output DIR.")

    found = [Found(variant.name, variant.settings) for variant in every]
    about = {
        "made_by": "lora-ft",
        "config": every[0].config.model_dump(mode="json"),
        "varied": {a.key: list(a.values) for a in axes},
        "tuned": {a.key: list(a.values) for a in grid},
        "tune_steps": tune_steps,
        "seeds": numbers,
        "metric": list(chosen_metric(every[0].config)),
        "tuning_metric": tuning_metric(every[0].config),
    }
    runner = Runner(folder, options, len(every) * (len(list(points(grid))) * bool(grid) + len(numbers)))

    def write() -> dict:
        result = about | {"base": base_metrics(found), "variants": [variant.as_dict() for variant in found]}
        write_json(folder / RESULT, result)
        write_page(result, folder)
        return result

    pairs = list(zip(every, found, strict=True))
    for variant, its in pairs if grid else ():
        tune_variant(variant, its, grid, tune_steps, numbers[0], runner)
        write()
    for variant, its in pairs:
        if not its.refused:
            train_variant(variant, its, numbers, runner, with_base=not base_metrics(found))
            write()
    if not any(its.runs for its in found):
        raise SystemExit(found[0].exit_code)  # why was said of each
    if with_latency:
        measure_latency(found, before, write, trust)
    result = write()
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
        print(folder / PAGE)


def seed_numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len({*numbers}) < len(numbers) or min(numbers) < 0:
        raise ConfigError(f"--seeds {text}: give whole numbers from 0, each once, as in --seeds 0,1,2")
    return numbers


def tune_variant(
    variant: Variant, its: Found, grid: Sequence[Axis], steps: int | None, seed: int, runner: Runner
) -> None:
    """Train on nine tenths of train with each point of the grid; the best on the last tenth is chosen, in `its`."""
    metric = tuning_metric(variant.config)
    for point in points(grid):
        name = folder_name(point)
        output = runner.folder / "tuning" / f"{variant.folder},{name}"
        config = tuning(variant, point, seed, output, steps)
        try:
            score = runner.run(f"{its.name}, tuning {name}", config)["metrics"][f"{TUNED_ON}_{metric}"]
        except Refused as refused:
            if refused.exit_code != NumbersError.exit_code:  # with another learning rate, say, it would be the same
                leave_out(its, refused)
                return
            score, overflow = None, refused
        else:
            for checkpoint in checkpoints(output):  # full fine-tuning's is three models, and only the score counts
                remove_checkpoint(checkpoint)
        its.tried.append({"settings": point, "score": score})
    scored = [tried for tried in its.tried if tried["score"] is not None]
    if scored:
        its.tuned = (min if metric == "loss" else max)(scored, key=lambda tried: tried["score"])["settings"]
    else:
        leave_out(its, overflow)


def train_variant(variant: Variant, its: Found, seeds: Sequence[int], runner: Runner, with_base: bool) -> None:
    """Train every seed; into `its`. with_base: the first run scores the base."""
    name = ",".join(filter(None, [variant.folder, folder_name(its.tuned)]))
    for seed in seeds:
        output = runner.folder / "runs" / f"{name},seed={seed}"
        config = final(variant, its.tuned, seed, output, evaluate_base=with_base and not its.runs)
        try:
            its.runs[seed] = {"output": str(output), "record": runner.run(f"{its.name}, seed {seed}", config)}
        except Refused as refused:
            leave_out(its, refused)
            return


def leave_out(its: Found, why: Refused) -> None:
    its.refused, its.exit_code = str(why), why.exit_code
    info(f"compare: {its.name}: left out: {its.refused}")


def measure_latency(found: Sequence[Found], before: dict, write: Callable[[], dict], trust: Trust) -> None:
    """Of each variant's first run; what an earlier comparison measured of the same weights is kept."""
    known = {v["latency"]["of"]: v["latency"] for v in before.get("variants", []) if v.get("latency")}
    for its in found:
        for run in list(its.runs.values())[:1]:
            files = run["record"].get("files") or {}
            of = next(entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors"))
            if of not in known:
                silence_libraries()
                from lora_ft.commands.compare.latency import latency

                known[of] = {"of": of} | latency(Path(run["output"]), trust)
            its.latency = known[of]
            write()
