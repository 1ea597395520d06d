"""The output folder of a run: whose it is, what it holds, its log.

output/                 the adapter, when the run has ended (lora_ft.json is written last)
output/log.jsonl        a line a logged step
output/tensorboard/     TensorBoard's files
output/report.html, curves.png, samples.json  to look at
output/checkpoints/step-N/
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_ft.core.errors import FilesError
from lora_ft.core.storage import read_json, verify_manifest

RECORD, LOG, LOCK = "lora_ft.json", "log.jsonl", ".lock"
REPORT, CURVES, SAMPLES = "report.html", "curves.png", "samples.json"
REPORTS = (REPORT, CURVES, SAMPLES)
WRITTEN = ("adapter_model.safetensors", "adapter_config.json", "README.md")
MODEL = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"  # this and MODEL: of full fine-tuning, which writes a whole model
MENTIONED = (LOG, "tensorboard", *REPORTS)  # by name only in an adapter's manifest


def check_writable(output: Path) -> None:
    """FilesError for an output that is a file or that the system won't let us write; nothing is made."""
    _check_no_file(output)
    there = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        why = "Read-only file system" if os.statvfs(there).f_flag & os.ST_RDONLY else "Permission denied"
        raise FilesError(f"output {output}: {there} can't be written ({why}). Name another: --set output=FOLDER.")


def _check_no_file(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FilesError(f"output {output}: a file. Name a folder: --set output=FOLDER.")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold `output` for this process, made if need be (and removed again if nothing came into it).

    Raises:
        FilesError: it is a file, can't be written, or another run holds it (its pid is named).
    """
    made = not output.exists()
    _check_no_file(output)
    lock = output / LOCK
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise FilesError(f"output {output}: can't be written ({e.strerror}). Name another: --set output=FOLDER.") from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = lock.exists() and os.path.samestat(os.fstat(handle), lock.stat())  # else its holder just ended
        except BlockingIOError:
            mine = False
        if not mine:
            holder = os.pread(handle, 20, 0).decode(errors="replace") or "just ending"
            raise FilesError(
                f"output {output}: in use by another run (pid {holder}). Wait for it, or name another: "
                "--set output=FOLDER."
            )
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        try:
            _remove_leftovers(output)
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made and not os.listdir(output):
                output.rmdir()
    finally:
        os.close(handle)


def check_foreign(output: Path) -> None:
    """Refuse to write over files that no record of ours lists.

    Raises:
        FilesError: a merged model or another tool's adapter is there, or a file of the user's with one of our names.
    """
    record = read_json(output / RECORD, FilesError) if (output / RECORD).is_file() else {}
    files = record.get("files") or {}
    if (output / "config.json").exists():  # transformers would load an adapter beside it as part of that model
        ended = record.get("kind") == "adapter" and "config.json" in files  # full fine-tuning's
        if not ended and not any("config.json" in listed(checkpoint) for checkpoint in checkpoints(output)):
            raise FilesError(f"output {output}: holds a model. Name another folder: --set output=FOLDER.")
    foreign = [name for name in WRITTEN if (output / name).exists() and name not in files]
    if LOG not in files and (output / LOG).exists() and not (output / LOG).read_bytes().startswith(b'{"step": '):
        foreign.append(LOG)
    foreign += [name for name in REPORTS if (output / name).exists() and not is_ours(output / name)]
    if foreign and not checkpoints(output):
        raise FilesError(
            f"output {output}: {', '.join(foreign)} there is not of a run of this tool and would be written over. Move it, "
            "or name another folder: --set output=FOLDER."
        )


def checkpoint_folders(output: Path) -> list[Path]:
    """Folders named as checkpoints, oldest first, whole or not."""
    found = (output / "checkpoints").glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name) and p.is_dir()), key=step_of)


def checkpoints(output: Path) -> list[Path]:
    """Checkpoints that are complete (their record is written last), oldest first."""
    return [p for p in checkpoint_folders(output) if (p / RECORD).is_file()]


def checkpoint_of(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def listed(folder: Path) -> list[str]:
    """The names in a folder's manifest, none of which leads out of it.

    Raises:
        FilesError: the record can't be read, or one does.
    """
    entries = read_json(folder / RECORD, FilesError).get("files") or {}
    names: dict = dict.fromkeys(entries) if isinstance(entries, dict) else entries
    verify_manifest(folder, names, FilesError)  # the names alone
    return list(names)


def check_removable(output: Path) -> None:
    """Refuse to begin to remove a run of which a part could not be removed.

    Raises:
        FilesError: as `listed`, of the run or of a checkpoint.
    """
    for folder in (*checkpoints(output), *([output] if (output / RECORD).is_file() else [])):
        listed(folder)


def remove_listed(folder: Path) -> None:
    """Remove what the folder's manifest lists, its record first: from then on it is no longer complete.

    Raises:
        FilesError: the record can't be read, or names files outside of the folder.
    """
    entries = listed(folder)
    (folder / RECORD).unlink()
    for name in entries:
        path = folder / name
        if path.is_dir() and not path.is_symlink():  # tensorboard/
            for events in path.glob("events.out.tfevents.*"):
                events.unlink()
            _remove_if_empty(path)
        else:
            path.unlink(missing_ok=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; its folder stays if something of anyone else's is in it.

    Raises:
        FilesError: as `remove_listed`.
    """
    if {p.name for p in checkpoint.iterdir()} <= {RECORD, *listed(checkpoint)}:
        aside = checkpoint.with_name(f".{checkpoint.name}.partial-{os.getpid()}")  # killed in here: `_remove_leftovers`
        checkpoint = checkpoint.rename(aside)
    remove_listed(checkpoint)
    _remove_if_empty(checkpoint)


def rotate(output: Path, limit: int | None, keep: set[int]) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the steps in `keep` or newer ones, nor what isn't whole."""
    removable = [p for p in checkpoints(output) if step_of(p) not in keep and step_of(p) < max(keep)]
    excess = len(removable) + len(keep) - limit if limit else 0
    for checkpoint in removable[: max(0, excess)]:
        with suppress(FilesError):  # damaged: left for a person to look at
            remove_checkpoint(checkpoint)


def clear(output: Path) -> None:
    """Remove an earlier run: what its manifests list, its checkpoints and its log. Foreign files stay."""
    for checkpoint in checkpoints(output):
        if not (output / RECORD).is_file():  # killed while its whole model landed
            for name in set(listed(checkpoint)).intersection((*MODEL, TEMPLATE)):
                (output / name).unlink(missing_ok=True)
        remove_checkpoint(checkpoint)
    _remove_if_empty(output / "checkpoints")
    if (output / RECORD).is_file():
        remove_listed(output)
    (output / LOG).unlink(missing_ok=True)
    for name in REPORTS:  # of a run that never ended
        if is_ours(output / name):
            (output / name).unlink()


def is_ours(report: Path) -> bool:
    """Whether a report's file is there and of this tool, by what stands in each at its beginning."""
    return report.is_file() and b"lora-ft" in report.read_bytes()[:1024]


def _remove_leftovers(output: Path) -> None:
    """Remove what killed runs had begun to write or remove; called by the lock's holder, so none of them is alive."""
    for path in output.glob(".*.tmp-*"):
        ours = "|".join(map(re.escape, (RECORD, *WRITTEN, *MODEL, TEMPLATE, *REPORTS)))
        if re.fullmatch(rf"\.({ours})\.tmp-\d+", path.name):
            path.unlink()
    for path in (output / "checkpoints").glob(".step-*.partial-*"):
        if re.fullmatch(r"\.step-\d+\.partial-\d+", path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
