"""Tables made once: memory-mapped Arrow files in the cache of `datasets`, found again by what they were made from.

An entry is KEY.arrow, and KEY.json with what is known of it, written last: an entry without it is not whole. A cache
that can't be written is replaced by a temporary folder that goes when the process does.
"""

import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm

from lora_ft.errors import FilesError

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
    return datasets.Dataset.from_file(str(path)), facts


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
