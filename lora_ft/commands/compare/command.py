"""`lora-ft compare`: tune each variant, train it on every seed, and compare scores and costs. Imports no torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_ft.commands.compare.display import show
from lora_ft.commands.compare.page import page
from lora_ft.commands.compare.results import Candidate, VariantResult, base_metrics
from lora_ft.commands.compare.runs import RunFailed, Runner
from lora_ft.commands.compare.variants import (
    final_config,
    folder_name,
    grid_points,
    make_variants,
    parse_axes,
    ranking_metric,
    tuning_run,
)
from lora_ft.config.learning_rate import AUTO
from lora_ft.config.schema import Config
from lora_ft.config.tuning import STAGES, better_half, keep_score, kept_scores, score_of, tuning_metric
from lora_ft.core.errors import ConfigError, FilesError, NumbersError
from lora_ft.core.messages import echo, echo_json, info
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
    one_by_one: bool = False,
    as_json: bool = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Compare variants of a config; writes compare.json and compare.html into `output` and prints the tables.

    Raises:
        UserError: the config or a variant of it is wrong.
        SystemExit: a run failed or was stopped, or no variant could be trained; with the run's exit code.
    """
    varied, tuned = parse_axes("--vary", vary), parse_axes("--tune", tune)
    if both := varied.keys() & tuned.keys():
        raise ConfigError(f"--tune {both.pop()}: is varied too; a setting is varied or tuned, not both")
    seed_list = parse_seeds(seeds)
    variants, grid = make_variants(path, overrides, varied), grid_points(tuned)
    config = variants[0].config
    folder = output or Path(f"{config.output.rstrip('/')}-compare")
    _check_distinct("--vary", [variant.folder for variant in variants])
    _check_distinct("--tune", [folder_name(point) for point in grid])
    for variant in variants:  # all config errors come before the first run
        for point in grid:
            tuning_run(variant, point, seed_list[0], folder, tune_steps)
            final = final_config(variant, point, seed_list[0], folder, evaluate_base=False)
            if tuned and final.train.learning_rate == AUTO:
                way_out = "Set a rate, or tune it: --tune train.learning_rate=1e-4,1e-3"
                raise ConfigError(f"train.learning_rate: auto is not supported with --tune. {way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    latency = _measured_latency(folder / RESULT)
    results = [VariantResult(variant) for variant in variants]
    settings = {
        "made_by": "lora-ft",
        "config": config.model_dump(mode="json"),
        "varied": varied,
        "tuned": tuned,
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

    runner = Runner(folder, trust.options(), len(variants) * ((len(grid) if tuned else 0) + len(seed_list)))
    for result in results if tuned else ():
        result.candidates = candidates(result, grid, tune_steps, seed_list[0], folder)
        result.left = list(result.candidates)
    for stage in STAGES:
        undecided = [result for result in results if len(result.left) > 1 and not result.failure]
        if not one_by_one:
            configs = [candidate.config for result in undecided for candidate in result.left]
            runner.train_together([c for c in configs if stage not in kept_scores(c)], until=stage)
        for result in undecided:
            with skip_if_refused(result):
                tune_variant(result, stage, runner)
            write()
    if not one_by_one:
        runner.train_together([c for r in results if not r.failure for c in final_runs(r, seed_list, folder).values()])
    for result in results:
        if not result.failure:
            with skip_if_refused(result):
                train_seeds(result, seed_list, runner)
            result.latency = latency.get(result.weights_hash, {})
            write()
    if (failure := results[0].failure) and not any(result.records for result in results):
        raise SystemExit(failure.exit_code)  # each reason has been printed
    if as_json:
        echo_json(write())
    else:
        show(write())
        echo(folder / PAGE)


def _check_distinct(option: str, names: Sequence[str]) -> None:
    """Raise ConfigError if two values get the same folder name, of letters, digits and at most 60 characters."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"{option}: two values have the same folder name, {twice}; compare them in separate comparisons"
        )


def parse_seeds(text: str) -> list[int]:
    """The seeds in `0,1,2`; a ConfigError if they are not whole numbers from 0, or one is given twice."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: give whole numbers from 0, each once, as in --seeds 0,1,2")
    return seeds


def candidates(
    result: VariantResult, grid: Sequence[dict], steps: int | None, seed: int, folder: Path
) -> list[Candidate]:
    """Each point of the grid with the config of its run."""
    outputs = [folder / "tuning" / f"{result.variant.folder},{folder_name(point)}" for point in grid]
    return [Candidate(p, tuning_run(result.variant, p, seed, o, steps)) for p, o in zip(grid, outputs, strict=True)]


def final_runs(result: VariantResult, seeds: Sequence[int], folder: Path) -> dict[int, Config]:
    """Seed -> the config of its run. The first scores the base too, and is compared with it row by row."""
    name = ",".join(filter(None, [result.variant.folder, folder_name(result.tuned)]))
    outputs = {seed: folder / "runs" / f"{name},seed={seed}" for seed in seeds}
    return {s: final_config(result.variant, result.tuned, s, o, s == seeds[0]) for s, o in outputs.items()}


def tune_variant(result: VariantResult, stage: float, runner: Runner) -> None:
    """Train what is left of the variant's candidates to the end of a stage; the better half by its score is left then."""
    metric = tuning_metric(result.variant.config)
    failed = RunFailed("failed with each value of --tune", NumbersError.exit_code)
    for candidate in result.left:
        if stage not in kept_scores(candidate.config):
            try:
                title = f"{result.variant.name}, tuning {folder_name(candidate.settings)}"
                record = runner.train(title, candidate.config, until=stage)
            except RunFailed as failure:
                if failure.exit_code != NumbersError.exit_code:
                    raise  # another learning rate, say, would not help
                failed = failure
                keep_score(candidate.config, stage, None)
            else:
                keep_score(candidate.config, stage, score_of(record, metric))
        candidate.stage, candidate.score = stage, kept_scores(candidate.config)[stage]
    is_last = stage == STAGES[-1]
    before, scores = result.left, {candidate: candidate.score for candidate in result.left}
    result.left = better_half(scores, metric, least=1 if is_last else 2)  # the last two are tried longest
    if not result.left:
        raise failed
    for candidate in before:
        if is_last or candidate not in result.left:  # it goes no further
            for checkpoint in checkpoints(Path(candidate.config.output)):  # full fine-tuning's is three models
                remove_checkpoint(checkpoint)


def train_seeds(result: VariantResult, seeds: Sequence[int], runner: Runner) -> None:
    """Train the tuned variant on every seed."""
    for seed, config in final_runs(result, seeds, runner.folder).items():
        result.records[seed] = runner.train(f"{result.variant.name}, seed {seed}", config)


@contextmanager
def skip_if_refused(result: VariantResult) -> Iterator[None]:
    """Leave the variant out of the comparison, with the reason, if a run within fails."""
    try:
        yield
    except RunFailed as failure:
        result.failure = failure
        info(f"compare: {result.variant.name}: skipped: {failure}")


def _measured_latency(path: Path) -> dict[str, dict]:
    """Hash of weights -> what benchmarks/latency.py has added to the compare.json of an earlier call."""
    result: dict = read_json(path, FilesError) if path.is_file() else {"made_by": "lora-ft"}
    if result.get("made_by") != "lora-ft":
        raise FilesError(f"{path}: is not from lora-ft. Give another folder: --output DIR.")
    return {v["latency"]["of"]: v["latency"] for v in result.get("variants", []) if v.get("latency")}
