"""Tables computed once: memory-mapped Arrow files in the cache of `datasets`, keyed by everything they depend on.

An entry is KEY.arrow and KEY.json with facts about the table. KEY.json is written last: an entry without it is incomplete.
If the cache is not writable, a temporary folder replaces it for the life of the process. The entries that were not used
for longest are removed when all take more than MAX_BYTES.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lora_ft.core.disk import WINDOWS, rename
from lora_ft.core.errors import FilesError
from lora_ft.core.machine import release_mapped
from lora_ft.core.paths import temporary_folder

MAX_BYTES = 20 * 2**30
DAY_SECONDS = 24 * 3600.0
BATCH = 1000  # rows that are in memory at once
RELEASED = 50  # batches of a pass over a table after which `release` is called
Write = Callable[[list[tuple]], None]


def key_of(*parts: Any) -> str:
    """SHA-256 of anything that JSON can represent."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached(
    key: str, schema: pa.Schema, make: Callable[[Write], dict], what: str, total: int | None = None
) -> tuple[datasets.Dataset, dict]:
    """The table with this key and the facts about it, from the cache or else made by `make(write)`.

    make: calls `write` with lists of rows, their values in the schema's order, and returns the facts (JSON). what: names the
    work in the progress bar and in errors. total: rows of the progress bar.

    Raises:
        FilesError: no room left on the disk.
    """
    if found := cached_table(key):
        return found
    folder = _folder()
    path, facts_path = folder / f"{key}.arrow", folder / f"{key}.json"
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.partial"
    partial, partial_facts = folder / f"{key}.arrow{suffix}", folder / f"{key}.json{suffix}"
    try:
        # a bar after two seconds (delay), and only on a terminal (disable=None)
        with partial.open("xb") as file, tqdm(desc=what, total=total, unit=" rows", delay=2, disable=None) as bar:
            written = 0
            with pa.ipc.new_stream(file, schema) as stream:

                def write(rows: list[tuple]) -> None:
                    nonlocal written
                    if rows:
                        columns = map(_column, zip(*rows, strict=True), schema.types)
                        stream.write_batch(pa.RecordBatch.from_arrays(list(columns), schema=schema))
                    written += len(rows)
                    bar.update(len(rows))

                facts = make(write)
            file.flush()
            os.fsync(file.fileno())
        partial_facts.write_text(json.dumps(facts | {"rows_written": written}), encoding="utf-8")
        try:
            rename(partial, path)
            rename(partial_facts, facts_path)
        except PermissionError:
            if not (WINDOWS and path.exists()):  # another process made the same table, and has it mapped
                raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FilesError(
                f"{folder}: no room left for {what} the data. Free some space, or set HF_DATASETS_CACHE to another folder."
            ) from e
        raise
    finally:
        partial.unlink(missing_ok=True)
        partial_facts.unlink(missing_ok=True)
    table = _opened(path)
    _trim(folder)
    return table, facts


def cached_table(key: str) -> tuple[datasets.Dataset, dict] | None:
    """The table with this key and the facts about it; None if it is not in the cache, or incomplete there."""
    path = _folder() / f"{key}.arrow"
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
        table = _opened(path)
        if len(table) != facts.pop("rows_written"):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None
    with suppress(OSError):  # a read-only cache
        os.utime(path.with_suffix(".json"))  # the time of last use, for `_trim`
    return table, facts


def column_batches(table: datasets.Dataset, name: str) -> Iterator[pa.Array]:
    """A column, BATCH rows at a time."""
    for n, batch in enumerate(table.select_columns([name]).with_format("arrow").iter(BATCH)):
        yield batch[name].combine_chunks()
        if n % RELEASED == 0:
            release(table)
    release(table)


def _opened(path: Path) -> datasets.Dataset:
    table = datasets.Dataset.from_file(str(path))
    release(table)  # opening it reads something of each batch
    return table


def release(table: datasets.Dataset) -> None:
    """Give back the memory of what was read of a table; see `release_mapped`."""
    release_mapped({os.path.realpath(file["filename"]) for file in table.cache_files})


def _column(values: tuple, type: pa.DataType) -> pa.Array:
    """Values as a column; arrays of numbers are converted as what they are, not number by number."""
    if isinstance(values[0], array):
        values = tuple(map(np.asarray, values))
    return pa.array(values, type)


def _trim(folder: Path) -> None:
    """Remove leftovers of killed runs, and the entries unused for longest while all take more than MAX_BYTES.

    Only files that match our naming and were not used within a day. A run that has a removed file mapped keeps its data: the
    file is freed when the mapping is.
    """
    entries: list[tuple[float, int, Path]] = []  # (time of last use, bytes, KEY.arrow)
    day_ago, total = time.time() - DAY_SECONDS, 0
    for path in folder.iterdir():
        with suppress(OSError):  # another process may trim at the same time
            if re.fullmatch(r"[0-9a-f]{64}\.(arrow|json)\.[\w-]+\.partial", path.name):
                if path.stat().st_mtime < day_ago:
                    path.unlink()
            elif re.fullmatch(r"[0-9a-f]{64}\.arrow", path.name):
                facts = path.with_suffix(".json")
                used, size = (facts if facts.exists() else path).stat().st_mtime, path.stat().st_size
                entries.append((used, size, path))
                total += size
    for used, size, path in sorted(entries):
        if total <= MAX_BYTES or used > day_ago:
            break
        with suppress(OSError):
            path.with_suffix(".json").unlink(missing_ok=True)  # first: it is what makes an entry complete
            path.unlink()
            total -= size


def _folder() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora_ft"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_replacement().name)


@cache
def _replacement() -> tempfile.TemporaryDirectory:
    return temporary_folder()
