"""Tables made once: memory-mapped Arrow files in the cache of `datasets`, found again by what they were made from.

An entry is KEY.arrow, and KEY.json with what is known of it, written last: an entry without it is not whole. A cache
that can't be written is replaced by a temporary folder that goes when the process does. Old entries go when all of
them take more than KEEP_BYTES.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm

from lora_ft.core.errors import FilesError

KEEP_BYTES = 20 * 2**30
DAY = 24 * 3600.0  # seconds
Batch = dict[str, list]
Write = Callable[[Batch], None]


def key_of(*parts: Any) -> str:
    """SHA-256 of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached(
    key: str, schema: pa.Schema, make: Callable[[Write], dict], what: str, total: int | None = None
) -> tuple[datasets.Dataset, dict]:
    """The table of this key and the facts about it, made by `make(write)` unless it is there already.

    make: calls `write` with batches of columns and returns the facts (JSON). what, total: of the progress bar, in rows.

    Raises:
        FilesError: no room on the disk.
    """
    folder = _folder()
    path, facts_path = folder / f"{key}.arrow", folder / f"{key}.json"
    try:
        facts = json.loads(facts_path.read_text())
        table = datasets.Dataset.from_file(str(path))
        if len(table) == facts["rows_written"]:
            with suppress(OSError):  # a cache that may only be read
                os.utime(facts_path)  # when it was last used: see `_trim`
            return table, facts
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        pass  # not there, or not whole: made anew
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.partial"
    partial, partial_facts = folder / f"{key}.arrow{suffix}", folder / f"{key}.json{suffix}"
    try:
        # a bar only for what takes longer than two seconds, and (disable=None) only on a terminal
        with partial.open("xb") as file, tqdm(desc=what, total=total, unit=" rows", delay=2, disable=None) as bar:
            written = 0
            with pa.ipc.new_stream(file, schema) as stream:

                def write(batch: Batch) -> None:
                    nonlocal written
                    record_batch = pa.RecordBatch.from_pydict(batch, schema=schema)
                    stream.write_batch(record_batch)
                    written += record_batch.num_rows
                    bar.update(record_batch.num_rows)

                facts = make(write)
            file.flush()
            os.fsync(file.fileno())
        facts["rows_written"] = written
        partial_facts.write_text(json.dumps(facts))
        partial.replace(path)
        partial_facts.replace(facts_path)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FilesError(
                f"{folder}: no room left ({what} the data). Make room, or point HF_DATASETS_CACHE elsewhere."
            ) from e
        raise
    finally:
        partial.unlink(missing_ok=True)
        partial_facts.unlink(missing_ok=True)
    table = datasets.Dataset.from_file(str(path))
    _trim(folder)
    return table, facts


def _trim(folder: Path) -> None:
    """Remove the entries that were used longest ago while all take more than KEEP_BYTES, and what killed runs left.

    Only files of our own naming, and none used within a day. A run that still has one mapped keeps what it sees: the
    file goes when the mapping does.
    """
    entries: list[tuple[float, int, Path]] = []  # last used, bytes, KEY.arrow
    past, total = time.time() - DAY, 0
    for path in folder.iterdir():
        with suppress(OSError):  # another process trims, too
            if re.fullmatch(r"[0-9a-f]{64}\.(arrow|json)\.[\w-]+\.partial", path.name) and path.stat().st_mtime < past:
                path.unlink()
            elif re.fullmatch(r"[0-9a-f]{64}\.arrow", path.name):
                facts = path.with_suffix(".json")
                used, size = (facts if facts.exists() else path).stat().st_mtime, path.stat().st_size
                entries.append((used, size, path))
                total += size
    for used, size, path in sorted(entries):
        if total <= KEEP_BYTES or used > past:
            break
        with suppress(OSError):
            path.with_suffix(".json").unlink(missing_ok=True)  # without it an entry is none
            path.unlink()
            total -= size


def _folder() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora_ft"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_temporary_folder().name)


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="lora-ft-data-")
