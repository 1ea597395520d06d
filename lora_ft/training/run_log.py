"""The log of a run: log.jsonl in its output, an object a line."""

import os
from pathlib import Path

from lora_ft.core.run_folder import LOG
from lora_ft.core.storage import append_line


def write_line(output: Path, line: dict) -> None:
    append_line(output / LOG, line)


def size(output: Path) -> int:
    """Bytes of the log, which are on the disk when this returns: a checkpoint is about to count on them."""
    log = output / LOG
    if not log.exists():
        return 0
    with log.open("rb") as f:
        os.fsync(f.fileno())
    return log.stat().st_size


def cut(output: Path, known: int) -> None:
    """Cut the log back to what a checkpoint knew of."""
    log = output / LOG
    if log.exists() and log.stat().st_size > known:
        os.truncate(log, known)
