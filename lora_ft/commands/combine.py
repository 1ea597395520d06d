"""`lora-ft combine` and `lora-ft compress`: one adapter of several, or a smaller one of one."""

import math
from collections.abc import Sequence
from pathlib import Path

from lora_ft.commands.evaluate import evaluate_command, note_other_template
from lora_ft.core.errors import ConfigError, FilesError
from lora_ft.core.messages import echo, echo_json, format_bytes, info, printable
from lora_ft.core.paths import local_path
from lora_ft.core.storage import sibling
from lora_ft.core.trust import Trust
from lora_ft.methods.lora.combine import Combined, Part, Settings, combine
from lora_ft.methods.lora.derived import check_same_base, open_part, write_derived
from lora_ft.methods.lora.peft_config import WEIGHTS

LOSSY = 0.1  # relative error from which combine says how to be more exact


def combine_command(parts: Sequence[str], output: Path, settings: Settings, *, as_json: bool = False) -> None:
    """Write the weighted sum of adapters as a new adapter, and print how far it is from the exact sum.

    parts: FOLDER=WEIGHT of each.

    Raises:
        ConfigError: a weight is no number, a folder is named twice, or options that don't go together.
        ModelError: no LoRA adapters, or of different bases.
        FilesError: `output` exists, or can't be written.
    """
    _refuse_existing(output)
    if settings.rank and settings.how in ("cat", "linear"):
        has = "the sum of the adapters' ranks" if settings.how == "cat" else "the rank that all adapters have"
        raise ConfigError(f"--how {settings.how} has {has}: leave --rank out, or use --how svd")
    named = [_folder_and_weight(text) for text in parts]
    for i, (folder, _) in enumerate(named):
        if folder in [other for other, _ in named[:i]]:
            raise ConfigError(f"{folder}: named twice; give it once, with the sum of the weights")
    opened = [Part(open_part(folder), weight) for folder, weight in named]
    check_same_base([part.adapter for part in opened])
    made = combine(opened, settings)
    rank = write_derived(output, opened, settings, made)
    summands = ", ".join(f"{part.weight:g} x {part.adapter.folder}" for part in opened)
    _tell(output, f"{settings.how} of {summands}", rank, made, as_json)
    if made.error > LOSSY and not as_json:
        nearer = "a higher --rank" if settings.how == "svd" else "--how svd"
        info(f"note: --how cat is exact, and {nearer} is closer")
    _note_templates(opened)


def compress_command(
    folder: Path,
    output: Path | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    evaluate: bool = False,
    as_json: bool = False,
    trust: Trust,
) -> None:
    """Write an adapter at a lower rank, and print how far it is from the original.

    rank: of every module. energy: instead, the share of each module's squared norm that is kept. evaluate: score both on the
    run's eval data.

    Raises:
        ConfigError: neither or both of rank and energy; `evaluate` without eval data, or as JSON.
        ModelError: no LoRA adapter.
        FilesError: `output` exists, or can't be written.
    """
    if (rank is None) == (energy is None):
        raise ConfigError("compress: give --rank N, or --energy SHARE, as in --energy 0.99")
    if evaluate and as_json:
        raise ConfigError(f"--eval and --json: give one; `lora-ft eval {folder} OUT --json` scores both as JSON")
    output = output or sibling(folder, "-small")
    _refuse_existing(output)
    part = Part(open_part(folder), 1.0)
    if evaluate and not ((part.adapter.trained.record.get("config") or {}).get("data") or {}).get("eval"):
        raise ConfigError(
            f"--eval: {folder} has no record of eval data. Leave it out, and use `lora-ft eval` with --data."
        )
    settings = Settings("svd", rank, energy)
    made = combine([part], settings)
    written = write_derived(output, [part], settings, made)
    before, after = ((of / WEIGHTS).stat().st_size for of in (folder, output))
    what = f"{folder}, {format_bytes(before)}, in {format_bytes(after)}"
    _tell(output, what, written, made, as_json)
    if evaluate:
        evaluate_command([folder, output], trust=trust)


def _tell(output: Path, what: str, rank: int, made: Combined, as_json: bool) -> None:
    if as_json:
        echo_json({"output": str(output), "rank": rank, "error": made.error, "errors": made.errors})
        return
    worst = max(made.errors, key=lambda module: made.errors[module])
    echo(f"{output}: {printable(what, 500)}")
    ranks = sorted({len(A) for A, _ in made.factors.values()})
    of_modules = f"{ranks[0]} to {rank}" if len(ranks) > 1 else str(rank)
    echo(f"  rank {of_modules} on {len(made.factors)} modules")
    echo(f"  error {made.error:.3%} of the exact update; {made.errors[worst]:.3%} at worst, in {worst}")


def _note_templates(parts: Sequence[Part]) -> None:
    """Say where a part was trained on another template than the one that the result has."""
    trained = [part.adapter.trained for part in parts if part.adapter.trained.record]
    config = trained[0].config if trained else None
    if config:
        for other in trained[1:]:
            note_other_template(other, config)


def _folder_and_weight(text: str) -> tuple[Path, float]:
    folder, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (folder and equals and math.isfinite(weight)):
        raise ConfigError(f"{printable(text)}: give FOLDER=WEIGHT, as in out/a=0.7")
    return local_path(folder), weight


def _refuse_existing(output: Path) -> None:
    """Before the work, as `atomic_folder` does after it."""
    if output.exists() or output.is_symlink():
        raise FilesError(f"{output}: exists already. Remove it or name another folder.")
