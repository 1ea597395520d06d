"""Writing and removing in a run's output folder: the log, old checkpoints, an earlier run.

Only what a manifest lists is ever removed, and only by the process that holds the lock.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from lora_ft.core.disk import WINDOWS, os_errors_as_files_error, rename, sync
from lora_ft.core.errors import FilesError
from lora_ft.core.paths import refuse_special
from lora_ft.core.run_folder import (
    ADAPTER_FILES,
    LOG,
    MODEL_FILES,
    RECORD,
    REPORTS,
    checkpoint_folders,
    checkpoints,
    is_own_report,
    manifest_names,
    step_of,
)
from lora_ft.core.storage import read_json

ANOTHER = "another folder: --set output=FOLDER."
HELD = (PermissionError,) if WINDOWS else ()  # by another program that reads it, such as `eval`


# ---- before a run ----


def check_writable(output: Path) -> None:
    """Raise FilesError unless `output` can be created or written; nothing is created."""
    check_not_a_file(output)
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = "Read-only file system" if read_only else "Permission denied"
        raise FilesError(f"output {output}: {existing} can't be written ({reason}). Use {ANOTHER}")


def check_foreign(output: Path) -> None:
    """Refuse to replace files that no record of this tool lists.

    Raises:
        FilesError: a merged model, another tool's adapter, or a user's file with one of the names of a run.
    """
    record = read_json(output / RECORD, FilesError) if (output / RECORD).is_file() else {}
    files = manifest_names(output) if record else []
    if (output / "config.json").exists():  # transformers would load an adapter beside it as part of that model
        fully_tuned = record.get("kind") == "adapter" and "config.json" in files
        if not fully_tuned and not any("config.json" in manifest_names(c) for c in checkpoints(output)):
            raise FilesError(f"output {output}: contains a model. Use {ANOTHER}")
    foreign = [name for name in ADAPTER_FILES if (output / name).exists() and name not in files]
    refuse_special(output / LOG, FilesError)
    if LOG not in files and (output / LOG).exists() and not (output / LOG).read_bytes().startswith(b'{"step": '):
        foreign.append(LOG)
    foreign += [name for name in REPORTS if (output / name).exists() and not is_own_report(output / name)]
    if foreign and not checkpoints(output):
        raise FilesError(
            f"output {output}: {', '.join(foreign)} would be replaced, but no run of this tool wrote it. Move it, or use "
            + ANOTHER
        )


def check_removable(output: Path) -> None:
    """Check that an earlier run can be removed completely, before any part of it is. Raises as `manifest_names`."""
    for folder in (output / "checkpoints", output / "tensorboard", *checkpoint_folders(output)):
        if folder.is_symlink():
            raise FilesError(f"{folder}: a link. Nothing is removed through links: remove the link, or use {ANOTHER}")
    for folder in (*checkpoints(output), *([output] if (output / RECORD).is_file() else [])):
        manifest_names(folder)


def check_not_a_file(output: Path) -> None:
    """Raise FilesError if `output` is something else than a folder."""
    if output.exists() and not output.is_dir():
        raise FilesError(f"output {output}: is a file. Use {ANOTHER}")


# ---- log.jsonl ----


def log_size(output: Path) -> int:
    """Bytes of the log, synced to the disk first, so that a checkpoint can rely on them."""
    log = output / LOG
    if not log.exists():
        return 0
    with os_errors_as_files_error(log):
        sync(log)
    return log.stat().st_size


def truncate_log(output: Path, size: int) -> None:
    """Cut the log back to `size` bytes, its length at a checkpoint."""
    if (output / LOG).exists() and (output / LOG).stat().st_size > size:
        os.truncate(output / LOG, size)


# ---- removal ----


def clear(output: Path) -> None:
    """Remove an earlier run: what its manifests list, its checkpoints and its log. Other files stay."""
    for checkpoint in checkpoints(output):
        if not (output / RECORD).is_file():  # killed while it wrote what was trained; a README may be anyone's
            for name in set(manifest_names(checkpoint)) & {*ADAPTER_FILES, *MODEL_FILES} - {"README.md"}:
                (output / name).unlink(missing_ok=True)
        remove_checkpoint(checkpoint)
    remove_if_empty(output / "checkpoints")
    if (output / RECORD).is_file():
        remove_listed(output)
    (output / LOG).unlink(missing_ok=True)
    for name in REPORTS:  # of a run that did not finish
        if is_own_report(output / name):
            (output / name).unlink()


def rotate(output: Path, limit: int | None, keep: set[int]) -> None:
    """Remove the oldest checkpoints beyond `limit`, but no steps in `keep`, newer ones or incomplete ones."""
    removable = [p for p in checkpoints(output) if step_of(p) not in keep and step_of(p) < max(keep)]
    excess = len(removable) + len(keep) - limit if limit else 0
    for checkpoint in removable[: max(0, excess)]:
        with suppress(FilesError, *HELD):  # damaged: left for the user to inspect
            remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; its folder stays if it contains files of anyone else. Raises as `remove_listed`."""
    if {p.name for p in checkpoint.iterdir()} <= {RECORD, *manifest_names(checkpoint)}:
        # under this name `remove_leftovers` finds it if the process is killed halfway
        checkpoint = rename(checkpoint, checkpoint.with_name(f".{checkpoint.name}.partial-{os.getpid()}"))
    remove_listed(checkpoint)
    remove_if_empty(checkpoint)


def remove_listed(folder: Path) -> None:
    """Remove what the folder's manifest lists, its record first, so that a half-removed folder counts as incomplete.

    Raises:
        FilesError: the record can't be read, or lists files outside of the folder.
    """
    names = manifest_names(folder)
    (folder / RECORD).unlink()
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():  # tensorboard/
            for events in path.glob("events.out.tfevents.*"):
                events.unlink()
            remove_if_empty(path)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers(output: Path) -> None:
    """Remove half-written and half-removed files of killed runs; the lock guarantees that none of them is running."""
    names = "|".join(map(re.escape, (RECORD, *ADAPTER_FILES, *MODEL_FILES, *REPORTS)))
    for path in output.glob(".*.tmp-*"):
        if re.fullmatch(rf"\.({names})\.tmp-\d+", path.name):
            path.unlink()
    for path in () if (output / "checkpoints").is_symlink() else (output / "checkpoints").glob(".step-*.partial-*"):
        if re.fullmatch(r"\.step-\d+\.partial-\d+", path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder with nothing in it."""
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
