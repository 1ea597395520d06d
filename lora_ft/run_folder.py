"""The output folder of a run: whose it is, what it holds, its log.

output/                 the adapter, when the run has ended (lora_ft.json is written last)
output/log.jsonl        a line a logged step
output/tensorboard/     TensorBoard's files
output/checkpoints/step-N/
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ft.errors import FilesError
from lora_ft.storage import append_line, read_json, verify_manifest

RECORD, LOG, LOCK = "lora_ft.json", "log.jsonl", ".lock"


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold `output` for this process, made if need be (and removed again if nothing came into it).

    Raises:
        FilesError: it is a file, can't be written, or another run holds it (its pid is named).
    """
    made = not output.exists()
    if not made and not output.is_dir():
        raise FilesError(f"output {output}: a file. Name a folder: --set output=FOLDER.")
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
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made and not os.listdir(output):
                output.rmdir()
    finally:
        os.close(handle)


def has_adapter(output: Path) -> bool:
    return (output / "adapter_config.json").is_file()


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders that are complete (their record is written last), oldest first."""
    found = (output / "checkpoints").glob("step-*")
    whole = [p for p in found if re.fullmatch(r"step-\d+", p.name) and (p / RECORD).is_file()]
    return sorted(whole, key=step_of)


def checkpoint_of(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint: what its manifest lists, and the folder if nothing of anyone else's is in it."""
    entries = read_json(checkpoint / RECORD, FilesError).get("files", {})
    verify_manifest(checkpoint, {name: None for name in entries}, FilesError)  # names stay inside
    (checkpoint / RECORD).unlink()  # first: from here on it is no checkpoint
    for name in entries:
        (checkpoint / name).unlink(missing_ok=True)
    if not os.listdir(checkpoint):
        checkpoint.rmdir()


def rotate(output: Path, limit: int | None, keep: set[int]) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the steps in `keep`."""
    removable = [p for p in checkpoints(output) if step_of(p) not in keep]
    excess = len(removable) + len(keep) - limit if limit else 0
    for checkpoint in removable[: max(0, excess)]:
        remove_checkpoint(checkpoint)


def clear(output: Path) -> None:
    """Remove an earlier run: what its manifests list, its checkpoints and its log. Foreign files stay."""
    for checkpoint in checkpoints(output):
        remove_checkpoint(checkpoint)
    if (output / RECORD).is_file():
        entries = read_json(output / RECORD, FilesError).get("files", {})
        verify_manifest(output, {name: None for name in entries}, FilesError)
        (output / RECORD).unlink()
        for name in entries:
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    (output / LOG).unlink(missing_ok=True)


def log_line(output: Path, line: dict) -> None:
    append_line(output / LOG, line)
