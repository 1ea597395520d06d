"""Resuming a run: from which checkpoint, and whether it is still the same run."""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from lora_ft.config.load import changes
from lora_ft.config.schema import Config
from lora_ft.core import run_folder
from lora_ft.core.errors import ConfigError, DataError, FilesError, ModelError
from lora_ft.core.messages import format_value, info, listed, warn
from lora_ft.core.paths import refuse_not_utf8
from lora_ft.core.storage import read_json, wrong_entries
from lora_ft.data.cache import cached_table
from lora_ft.data.examples import Examples
from lora_ft.methods.trained import is_trained
from lora_ft.training.checkpoint import JSON, State, best_step, is_intact
from lora_ft.training.output import check_foreign, check_no_links, check_removable, truncate_log

HOLDS_RUN = (
    "already contains a run. Use --resume to continue it, --overwrite to replace it, or name another folder: "
    "--set output=FOLDER."
)
# What a record contains that resuming reads, and its type
NEEDED: dict[str, Any] = {"config": dict, "planned_steps": int, "base.fingerprint": str, "tokenizer": str}
NEEDED |= {"data.train": dict, "data.eval": dict | None, "versions": dict | None, "machine": dict | None}


def find_starting_point(output: Path, config: Config, resume: bool, overwrite: bool) -> Path | None:
    """The folder to resume from: a checkpoint, `output` itself if its run has ended with this config, or None.

    Raises:
        FilesError: `output` holds a run and neither flag was given, no checkpoint is intact, or its name is not UTF-8.
        ConfigError: the run used settings that lead to another result.
    """
    if not resume:
        check_output(output, overwrite)
        return None
    refuse_not_utf8(output, FilesError)
    check_no_links(output / run_folder.LOG, *run_folder.checkpoint_folders(output))  # cut back; removed by rotation
    ended = read_run(output)
    if ended:
        check_settings(ended, config)
        if not changes(ended["config"], config)["longer"]:
            return output
    checkpoint = newest_checkpoint(output, config.train.load_best_model_at_end)
    if checkpoint is None:
        info(f"nothing to resume in {output}: starting at step 0")
        return None
    if not ended:
        record = read_run(checkpoint)
        assert record is not None, "an intact checkpoint has a record"
        check_settings(record, config)
    return checkpoint


def check_output(output: Path, overwrite: bool) -> None:
    """Check that a new run can have the folder. Raises FilesError, as if it holds one and that is not to be overwritten."""
    refuse_not_utf8(output, FilesError)
    check_foreign(output)
    if overwrite:
        check_removable(output)
    elif holds_run(output):
        raise FilesError(f"output {output}: {HOLDS_RUN}")


def holds_run(output: Path) -> bool:
    """Whether a run, finished or not, is in the folder. Raises FilesError if its record is damaged."""
    return is_trained(output, FilesError) or bool(run_folder.checkpoints(output))


def read_run(folder: Path) -> dict | None:
    """The record of a run or a checkpoint, checked for all that resuming needs; None if there is no record.

    Raises:
        FilesError: it is damaged (no hash covers the record itself), or does not belong to a run.
    """
    record = run_folder.read_record(folder)
    if record is None:
        return None
    if record.get("kind") not in ("checkpoint", "adapter"):
        raise FilesError(
            f"{folder}: its {run_folder.RECORD} does not belong to a run. Name another folder: --set output=FOLDER."
        )
    if damaged := wrong_entries(record, NEEDED):
        raise FilesError(
            f"{folder / run_folder.RECORD}: damaged: {', '.join(damaged)} missing or of the wrong type. Restore it from "
            "a backup, or start over with --overwrite."
        )
    return record


def announce_resume(before: dict, record: dict, state: State | None, steps: int, output: Path) -> None:
    """Print where the run resumes, warn of a new length, versions or machine, and cut the log back to that step.

    Raises ConfigError if the run would become shorter.
    """
    assert state is not None
    if steps < before["planned_steps"]:
        raise ConfigError(
            f"--resume: {steps} steps are fewer than the run's {before['planned_steps']}, so its schedule would change. Set "
            "num_train_epochs or max_steps back, or start over with --overwrite."
        )
    info(f"resuming after step {state.step} of {steps}")
    if steps > before["planned_steps"]:
        info(
            f"the run is longer now, {steps} steps instead of {before['planned_steps']}: the learning rate follows the new "
            "schedule from here, so the result differs from a run that had this length from the start"
        )
    for name in ("versions", "machine"):
        old, new = ({k: v for k, v in (of.get(name) or {}).items() if k != "runs_together"} for of in (before, record))
        different = [
            f"{k} {old.get(k)} is now {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
        ]
        if different:
            warn(f"{', '.join(different)}: the result may differ by rounding.")
    truncate_log(output, state.values["log_size"])


def newest_checkpoint(output: Path, needs_best: bool = False) -> Path | None:
    """The newest intact checkpoint; each skipped one is named on stderr.

    needs_best: rather one whose best checkpoint so far is intact too, if any; the run then writes the damaged one again.

    Raises:
        FilesError: all checkpoints are damaged, or there is an adapter without checkpoints.
    """
    found, without_best = run_folder.checkpoint_folders(output), []
    for folder in reversed(found):
        if not is_intact(folder):
            info(f"skipped checkpoint {folder}: damaged or incomplete")
        elif needs_best and lost_best(folder):
            without_best.append(folder)
        else:
            for newer in without_best:
                info(f"skipped checkpoint {newer}: the best one so far, {lost_best(newer)}, is damaged or missing")
            return folder
    if without_best:
        return without_best[0]
    if found:
        raise FilesError(
            f"{output}: all {len(found)} checkpoints are damaged. Restore one from a backup, or start over with --overwrite."
        )
    if is_trained(output, FilesError):
        raise FilesError(f"{output}: has an adapter but no checkpoints to resume from. Start over with --overwrite.")
    return None


def lost_best(checkpoint: Path) -> Path | None:
    """The best checkpoint so far of an intact one, if that is damaged or missing."""
    step = best_step(read_json(checkpoint / JSON, FilesError))
    best = checkpoint.with_name(f"step-{step}")
    return best if step is not None and not is_intact(best) else None


def read_state(checkpoint: Path, needs_best: bool) -> State:
    """The state to resume from. If its best checkpoint is lost, and needed, the best of the coming steps takes its place."""
    state = State.read(checkpoint)
    if needs_best and (best := lost_best(checkpoint)):
        warn(
            f"the best checkpoint so far, {best}, is damaged or missing: the best after step {state.step} takes its place."
        )
        state.forget_best()
    return state


def check_settings(record: dict, config: Config) -> None:
    """Refuse settings that would change the result (ConfigError); warn of those that change only rounding."""
    found = changes(record["config"], config)
    if found["result"]:
        lines = "\n".join(f"  {line}" for line in found["result"])
        raise ConfigError(
            f"--resume: these settings differ from the run in {config.output} and would change its result:\n{lines}\n"
            "Set them back, or start over with --overwrite."
        )
    for line in found["rounding"]:
        warn(f"{line}. Only rounding and dropout masks change.")


def check_data(record: dict, tokenizer_hash: str, train_set: Examples, eval_sets: dict[str, Examples]) -> None:
    """Check that data, tokenizer and chat template are those that the run started with.

    Raises:
        DataError: the content of the data has changed.
        ModelError: the tokenizer or the chat template has changed.
    """
    if record["tokenizer"] != tokenizer_hash:
        raise ModelError(
            "--resume: the tokenizer has changed since the run started. Restore it, or start over with --overwrite."
        )
    evals = record["data"].get("eval") or {}
    sources = [("train", train_set, record["data"]["train"])]
    sources += [
        (f"eval.{name}" if name else "eval", e, evals.get(name) if name else evals) for name, e in eval_sets.items()
    ]
    for which, examples, recorded in sources:
        before = recorded if isinstance(recorded, dict) else {}
        if before.get("content") != examples.report.content:
            raise DataError(
                f"--resume: data.{which} has changed since the run started{_changes(before, examples)}. Restore it, or start "
                "over with --overwrite."
            )
        if before.get("sha256") != examples.report.sha256:
            raise ModelError(
                f"--resume: data.{which} is encoded differently now: the chat template has changed, or how long rows are cut "
                "(data.truncate; earlier versions: prompts at the start, chats at the end). Restore it."
            )


def _changes(before: dict, examples: Examples) -> str:
    """What is other in the data than a record has: rows, files, and the first row, if its text is in the cache still."""
    old, new = before.get("files"), examples.report.files
    rows, found = before.get("rows"), []
    if isinstance(rows, int) and rows != examples.report.rows:
        found.append(f"{rows:,} rows, now {examples.report.rows:,}")
    if isinstance(old, dict) and old and new:
        found += [f"{name} is other" for name in new if name in old and old[name] != new[name]]
        found += [f"{name} is new" for name in new if name not in old]
        found += [f"{name} is missing" for name in old if name not in new]
    if row := _first_changed_row(before.get("texts"), examples.texts):
        found.append(row)
    return f": {listed(found)}" if found else ""


def _first_changed_row(key: Any, texts: Dataset) -> str | None:
    """The first of the texts that another table of texts, of that key, has not, or in other words."""
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key) or not (found := cached_table(key)):
        return None
    position = {row: i for i, row in enumerate(found[0]["row"])}
    for now in texts:
        was = found[0][position[now["row"]]] if now["row"] in position else {}
        for part in ("prompt", "completion", "choices", "label"):
            if was.get(part) != now[part]:
                old = f"was {format_value(was[part])}, " if was else ""
                return f"{now['where']} is the first row that differs: its {part} {old}is {format_value(now[part])}"
    return None
