"""The rows of data files and hub data sets, streamed, each with its location. Only .json files are held in memory."""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_ft.core.errors import DataError
from lora_ft.core.messages import first_line, printable
from lora_ft.core.names import is_local
from lora_ft.core.paths import refuse_not_utf8
from lora_ft.core.storage import sha256
from lora_ft.data.delimited import read_delimited
from lora_ft.data.files import DEFAULT, FileFormat, data_files, kind
from lora_ft.data.json_files import SourceRow, read_json, read_jsonl

MAX_UNPACKED, MAX_EXPANSION = 2**30, 100  # of a Parquet file: bytes or rows; how many times its size beyond that
BATCH_BYTES = 2**28  # what rows of a Parquet file that are read at once can take


def iter_rows(source: str, format: FileFormat = DEFAULT) -> Iterator[SourceRow]:
    """The rows of local .jsonl, .json, .csv, .tsv or .parquet files (a file, a folder, or a pattern; all but .parquet may be
    compressed), or of a hub data set `id[:config][@split]`.

    A malformed row is yielded with its problem; an error ends the iteration.

    Raises:
        DataError: no such file, an unsupported kind of file, a file damaged so that reading cannot continue (with
            path and line), or a data set that cannot be loaded from the hub.
    """
    if not is_local(source):
        dataset = _load_hub(source)
        yield from (SourceRow(f"{source} row {i}", columns) for i, columns in enumerate(dataset, 1))
        return
    for path in data_files(source):
        try:
            yield from _read(path, format)
        except OSError as e:
            raise DataError(f"{_name(path)}: cannot be read: {e.strerror or e}.") from e


def _read(path: Path, format: FileFormat) -> Iterator[SourceRow]:
    match kind(path):
        case ".jsonl":
            yield from read_jsonl(path, format.encoding)
        case ".json":
            yield from read_json(path, format.encoding)
        case ".parquet":
            yield from _parquet(path)
        case _:
            name, records = _name(path), read_delimited(path, format)
            yield from (SourceRow(f"{name}:{line}", columns, problem) for line, columns, problem in records)


def content_hash(source: str, format: FileFormat = DEFAULT) -> tuple[str, dict[str, str]]:
    """SHA-256 of what is read, and of each file by name: of a file's bytes, or of several files', with their format unless it
    is the default; of a hub data set the fingerprint, which identifies its revision and split. Raises DataError."""
    if not is_local(source):
        digest = hashlib.sha256(_load_hub(source)._fingerprint.encode()).hexdigest()
        return digest, {source: digest}
    by_name = {}
    for path in data_files(source):
        try:
            by_name[str(path)] = sha256(path)
        except OSError as e:
            raise DataError(f"{_name(path)}: cannot be read: {e.strerror or e}.") from e
    hashes = [*by_name.values(), *([] if format == DEFAULT else [repr(format)])]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest(), by_name


def class_names(source: str) -> dict[str, list[str]]:
    """The words of the classes of a source's columns, by id, where `datasets` has stored them. Raises DataError."""
    if not is_local(source):
        return {name: list(f.names) for name, f in _load_hub(source).features.items() if hasattr(f, "names")}
    path = data_files(source)[0]
    if kind(path) != ".parquet":
        return {}
    import pyarrow
    import pyarrow.parquet

    try:
        stored = json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features", {}).items()
        return {name: feature["names"] for name, feature in features if feature.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, KeyError, pyarrow.ArrowException):
        return {}  # other software's; damage is told when the rows are read


def _name(path: Path) -> str:
    return printable(str(path))


def _parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    name = _name(path)
    refuse_not_utf8(path, DataError)
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            size = _batch_rows(file.metadata, path)
            rows = (row for batch in file.iter_batches(batch_size=size) for row in batch.to_pylist())
            yield from (SourceRow(f"{name} row {i}", row) for i, row in enumerate(rows, 1))
    except pyarrow.ArrowException as e:
        raise DataError(f"{name}: damaged Parquet file: {first_line(e)}") from e


def _batch_rows(metadata: Any, path: Path) -> int:
    """Rows to read at once, so that they fit into memory; DataError if the file claims to hold absurdly more than it has."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    stored, claimed = path.stat().st_size, sum(group.total_byte_size for group in groups)
    if max(claimed, metadata.num_rows) > max(MAX_UNPACKED, MAX_EXPANSION * stored):
        raise DataError(
            f"{_name(path)}: its {stored:,} bytes claim to hold {metadata.num_rows:,} rows of {claimed:,} bytes, more than "
            f"{MAX_EXPANSION:,} times as much. Damaged, or made to fill this machine; write it again if it is neither."
        )
    # a value is stored at least once in its row group, so a row may be as large as that, and may be repeated without end
    largest = max((group.total_byte_size for group in groups), default=0)
    return max(1, min(1024, BATCH_BYTES // max(1, largest)))


@lru_cache(maxsize=8)  # a source is hashed, then read
def _load_hub(source: str):
    from lora_ft.data.hub import load_split

    return load_split(source)
