"""`lora-ft compare`: tune each variant, train it on every seed, and compare scores and costs. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from lora_ft.commands.compare.display import page, show
from lora_ft.commands.compare.results import VariantResult, base_metrics
from lora_ft.commands.compare.runs import RunFailed, Runner
from lora_ft.commands.compare.variants import (
    TUNING_SET,
    Axis,
    final_config,
    folder_name,
    grid_points,
    make_variants,
    parse_axis,
    ranking_metric,
    tuning_config,
    tuning_metric,
)
from lora_ft.core.errors import ConfigError, FilesError, NumbersError
from lora_ft.core.messages import info
from lora_ft.core.metrics import metric_of
from lora_ft.core.run_folder import checkpoints
from lora_ft.core.storage import read_json, write_json
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.report.render import write_page
from lora_ft.training.output import remove_checkpoint

RESULT, PAGE = "compare.json", "compare.html"


def compare_command(
    path: Path,
    *,
    vary: Sequence[str],
    seeds: str = "0",
    tune: Sequence[str] = (),
    tune_steps: int | None = None,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    as_json: bool = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Compare variants of a config; writes compare.json and compare.html into `output` and prints the tables.

    Raises:
        UserError: the config or a variant of it is wrong.
        SystemExit: a run failed or was stopped, or no variant could be trained; with the run's exit code.
    """
    axes, grid = [parse_axis("--vary", text) for text in vary], [parse_axis("--tune", text) for text in tune]
    if both := {axis.key for axis in axes} & {axis.key for axis in grid}:
        raise ConfigError(f"--tune {both.pop()}: is varied too; a setting is varied or tuned, not both")
    seed_list = parse_seeds(seeds)
    variants = make_variants(path, overrides, axes)
    config = variants[0].config
    folder = output or Path(f"{config.output.rstrip('/')}-compare")
    for variant in variants:  # all config errors come before the first run
        for point in grid_points(grid):
            tuning_config(variant, point, seed_list[0], folder, tune_steps)
            final_config(variant, point, seed_list[0], folder, evaluate_base=False)
    folder.mkdir(parents=True, exist_ok=True)
    latency = _measured_latency(folder / RESULT)
    results = [VariantResult(variant) for variant in variants]
    settings = {
        "made_by": "lora-ft",
        "config": config.model_dump(mode="json"),
        "varied": {axis.key: list(axis.values) for axis in axes},
        "tuned": {axis.key: list(axis.values) for axis in grid},
        "tune_steps": tune_steps,
        "seeds": seed_list,
        "metric": list(ranking_metric(config)),
        "tuning_metric": tuning_metric(config),
    }

    def write() -> dict:
        result = settings | {"base": base_metrics(results), "variants": [r.as_dict() for r in results]}
        write_json(folder / RESULT, result)
        write_page(folder / PAGE, page(result))
        return result

    options = ["--trust-remote-code"] * trust.remote_code + ["--allow-pickle"] * trust.pickles
    tuning_runs = len(list(grid_points(grid))) if grid else 0
    runner = Runner(folder, options, len(variants) * (tuning_runs + len(seed_list)))
    for result in results if grid else ():
        tune_variant(result, grid, tune_steps, seed_list[0], runner)
        write()
    for result in results:
        if not result.skip_reason:
            train_seeds(result, seed_list, runner, with_base=not base_metrics(results))
            result.latency = latency.get(result.weights_hash, {})
            write()
    if not any(result.records for result in results):
        raise SystemExit(results[0].exit_code)  # each reason has been printed
    if as_json:
        print(json.dumps(write()))
    else:
        show(write())
        print(folder / PAGE)


def parse_seeds(text: str) -> list[int]:
    """The seeds in `0,1,2`; a ConfigError if they are not whole numbers from 0, or one is given twice."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: give whole numbers from 0, each once, as in --seeds 0,1,2")
    return seeds


def tune_variant(result: VariantResult, grid: Sequence[Axis], steps: int | None, seed: int, runner: Runner) -> None:
    """Train with each point of the grid on nine tenths of train; `result` gets the best by its score on the last tenth."""
    metric = tuning_metric(result.variant.config)
    for point in grid_points(grid):
        name = folder_name(point)
        output = runner.folder / "tuning" / f"{result.variant.folder},{name}"
        config = tuning_config(result.variant, point, seed, output, steps)
        try:
            record = runner.train(f"{result.variant.name}, tuning {name}", config)
        except RunFailed as failure:
            if failure.exit_code != NumbersError.exit_code:  # another learning rate, say, would not help
                mark_skipped(result, failure)
                return
            score, overflow = None, failure
        else:
            score = record["metrics"][f"{TUNING_SET}_{metric}"]
            for checkpoint in checkpoints(output):  # full fine-tuning's is three models, and only the score is needed
                remove_checkpoint(checkpoint)
        result.tried.append({"settings": point, "score": score})
    scored = [tried for tried in result.tried if tried["score"] is not None]
    if scored:
        best = min if metric_of(metric).lower_is_better else max
        result.tuned = best(scored, key=lambda tried: tried["score"])["settings"]
    else:
        mark_skipped(result, overflow)


def train_seeds(result: VariantResult, seeds: Sequence[int], runner: Runner, with_base: bool) -> None:
    """Train the tuned variant on every seed. with_base: its first run scores the base too."""
    name = ",".join(filter(None, [result.variant.folder, folder_name(result.tuned)]))
    for seed in seeds:
        output = runner.folder / "runs" / f"{name},seed={seed}"
        config = final_config(result.variant, result.tuned, seed, output, with_base and not result.records)
        try:
            result.records[seed] = runner.train(f"{result.variant.name}, seed {seed}", config)
        except RunFailed as failure:
            mark_skipped(result, failure)
            return


def mark_skipped(result: VariantResult, failure: RunFailed) -> None:
    """Leave a variant out of the comparison, with the reason."""
    result.skip_reason, result.exit_code = str(failure), failure.exit_code
    info(f"compare: {result.variant.name}: skipped: {result.skip_reason}")


def _measured_latency(path: Path) -> dict[str, dict]:
    """Hash of weights -> what benchmarks/latency.py has added to the compare.json of an earlier call."""
    result: dict = read_json(path, FilesError) if path.is_file() else {"made_by": "lora-ft"}
    if result.get("made_by") != "lora-ft":
        raise FilesError(f"{path}: is not from lora-ft. Give another folder: --output DIR.")
    return {v["latency"]["of"]: v["latency"] for v in result.get("variants", []) if v.get("latency")}
