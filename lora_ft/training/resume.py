"""Going on with a run: from which checkpoint, and whether it is still the same run."""

from pathlib import Path

from lora_ft.config.load import Config, changes
from lora_ft.core import run_folder
from lora_ft.core.errors import ConfigError, DataError, FilesError, ModelError
from lora_ft.core.messages import info, warn
from lora_ft.data.examples import Examples
from lora_ft.methods.trained import is_trained, read_record
from lora_ft.training import run_log
from lora_ft.training.checkpoint import State
from lora_ft.training.saving import is_intact


def find_starting_point(output: Path, config: Config, resume: bool, overwrite: bool) -> Path | None:
    """The folder to go on from: a checkpoint, `output` itself when its run has ended with this config, or None.

    Raises:
        FilesError: `output` holds a run and neither flag was given; or nothing whole to go on from.
        ConfigError: the run there was made with settings that give another result.
    """
    if not resume:
        run_folder.check_foreign(output)
        if overwrite:
            run_folder.check_removable(output)
        elif is_trained(output, FilesError) or run_folder.checkpoints(output):
            raise FilesError(
                f"output {output}: holds a run already. Go on with it: --resume, replace it: --overwrite, or name another: "
                "--set output=FOLDER."
            )
        return None
    ended = read_run(output)
    if ended:
        check_settings(ended, config)
        if not changes(ended["config"], config)["longer"]:
            return output
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        info(f"nothing to resume in {output}: beginning at step 0")
        return None
    if not ended:
        record = read_run(checkpoint)
        assert record is not None, "a whole checkpoint has a record"
        check_settings(record, config)
    return checkpoint


def read_run(folder: Path) -> dict | None:
    """The record of a run or a checkpoint, with all that going on with it needs; None if there is no record.

    Raises:
        FilesError: it is damaged (no hash covers the record itself), or of no run.
    """
    record = read_record(folder)
    if record is None:
        return None
    if record.get("kind") not in ("checkpoint", "adapter"):
        raise FilesError(
            f"{folder}: its {run_folder.RECORD} is of no run to go on with. Name another: --set output=FOLDER."
        )
    base, data = record.get("base") or {}, record.get("data") or {}
    needed = {
        "config": (record.get("config"), dict),
        "planned_steps": (record.get("planned_steps"), int),
        "base": (base, dict),
        "base.fingerprint": (base.get("fingerprint") if isinstance(base, dict) else None, str),
        "tokenizer": (record.get("tokenizer"), str),
        "data": (data, dict),
        "data.train": (data.get("train") if isinstance(data, dict) else None, dict),
        "data.eval": ((data.get("eval") if isinstance(data, dict) else None) or {}, dict),
        "versions": (record.get("versions") or {}, dict),
        "machine": (record.get("machine") or {}, dict),
    }
    damaged = [name for name, (value, kind) in needed.items() if not isinstance(value, kind)]
    if damaged:
        raise FilesError(
            f"{folder / run_folder.RECORD}: damaged: {', '.join(damaged)} missing or of another type. Restore it from a "
            "copy, or begin anew: --overwrite."
        )
    return record


def announce_resume(before: dict, record: dict, state: State | None, steps: int, output: Path) -> None:
    """Say from where the run goes on, and what a new length means; cut the log back to it.

    Raises:
        ConfigError: the run would be shorter than it was.
    """
    assert state is not None
    if steps < before["planned_steps"]:
        raise ConfigError(
            f"--resume: {steps} steps are fewer than the run's {before['planned_steps']}: its schedule would be another. "
            "Set num_train_epochs or max_steps back, or begin anew: --overwrite."
        )
    info(f"resuming after step {state.step} of {steps}")
    if steps > before["planned_steps"]:
        info(
            f"the run is longer now, {steps} steps instead of {before['planned_steps']}: from here on the learning rate "
            "follows the schedule of the new length, so the result is not that of a run that had this length from the start"
        )
    check_surroundings(before, record)
    run_log.cut(output, state.values["log_size"])


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was written; each skipped one is named on stderr.

    Raises:
        FilesError: there are checkpoints but none is whole, or an adapter without any.
    """
    found = run_folder.checkpoint_folders(output)
    for folder in reversed(found):
        if is_intact(folder):
            return folder
        info(f"skipped checkpoint {folder}: damaged or not complete")
    if found:
        raise FilesError(
            f"{output}: none of its {len(found)} checkpoints is whole. Restore one, or begin anew: --overwrite."
        )
    if is_trained(output, FilesError):
        raise FilesError(f"{output}: holds an adapter but no checkpoints to go on from. Begin anew: --overwrite.")
    return None


def check_settings(record: dict, config: Config) -> None:
    """Refuse what would change the result; say what changes only rounding.

    Raises:
        ConfigError: each setting that differs.
    """
    found = changes(record["config"], config)
    if found["result"]:
        lines = "\n".join(f"  {line}" for line in found["result"])
        raise ConfigError(
            f"--resume: these settings are not those of the run in {config.output}, and would change its result:\n{lines}\n"
            "Set them back, or begin anew: --overwrite."
        )
    for line in found["rounding"]:
        warn(f"{line}. This changes rounding, and where dropout falls, but not more.")


def check_surroundings(record: dict, here: dict) -> None:
    """Say what else may change rounding: versions, device, threads."""
    for name in ("versions", "machine"):
        was, now = record.get(name) or {}, here.get(name) or {}
        different = [
            f"{k} {was.get(k)} is now {now.get(k)}" for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)
        ]
        if different:
            warn(f"{', '.join(different)}: the result may differ by rounding.")


def check_data(record: dict, tokenizer_hash: str, train_set: Examples, eval_sets: dict[str, Examples]) -> None:
    """Refuse other data, another tokenizer or chat template than the run began with.

    Raises:
        DataError: the data's content changed.
        ModelError: tokenizer or chat template changed.
    """
    if record["tokenizer"] != tokenizer_hash:
        raise ModelError("--resume: the tokenizer changed since the run began. Restore it, or begin anew: --overwrite.")
    evals = record["data"]["eval"] or {}
    checked = [("train", train_set, record["data"]["train"])]
    checked += [
        (f"eval.{name}" if name else "eval", e, evals.get(name) if name else evals) for name, e in eval_sets.items()
    ]
    for which, examples, was in checked:
        before = was if isinstance(was, dict) else {}
        if before.get("content") != examples.report.content:
            raise DataError(
                f"--resume: data.{which} has other content than when the run began. Restore it, or: --overwrite."
            )
        if before.get("sha256") != examples.report.sha256:
            raise ModelError(f"--resume: data.{which} is encoded otherwise now: the chat template changed. Restore it.")
