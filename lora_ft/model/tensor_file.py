"""The tensors of a safetensors file, read and written one at a time and without torch, whose import takes seconds.

The format: 8 bytes with the length of the header, the header as JSON (name -> dtype, shape, offsets), the tensors' bytes.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ft.core.errors import ModelError
from lora_ft.core.paths import refuse_hollow, refuse_special
from lora_ft.core.storage import atomic_file

MOST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
BLOCK = 2**22  # elements that are converted at a time
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # BF16: the upper half of a float32


class Stored(NamedTuple):
    """Where a tensor is in its file: `start` and `end` in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_float(self) -> bool:
        """Whether `values` can read it; a quantized weight is not."""
        return self.dtype in FLOATS

    def blocks(self) -> Iterator[np.ndarray]:
        """Its values in order, as flat float32 arrays of at most BLOCK elements."""
        kind = np.dtype(FLOATS[self.dtype])
        if self.start == self.end:
            return
        stored = np.memmap(self.path, kind, "r", self.start, (self.end - self.start) // kind.itemsize)
        for i in range(0, len(stored), BLOCK):
            block = stored[i : i + BLOCK]
            yield (block.astype("<u4") << 16).view("<f4") if self.dtype == "BF16" else block.astype("<f4")

    def values(self) -> np.ndarray:
        """All its values in its shape, float32."""
        blocks = list(self.blocks())
        return np.concatenate(blocks).reshape(self.shape) if blocks else np.zeros(self.shape, "<f4")

    def part(self, index: int) -> "Stored":
        """One of the tensors that are stacked in it."""
        size = (self.end - self.start) // self.shape[0]
        start = self.start + index * size
        return Stored(self.path, self.dtype, self.shape[1:], start, start + size)

    def norm(self) -> float:
        """Its Frobenius norm."""
        return math.sqrt(sum(float(np.linalg.norm(block)) ** 2 for block in self.blocks()))

    def hash(self) -> str:
        """16 hex digits of the SHA-256 of its bytes: enough to tell tensors apart."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return hashlib.sha256(file.read(self.end - self.start)).hexdigest()[:16]


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> where it is, of every tensor in a safetensors file.

    Raises:
        ModelError: the file is missing, truncated or damaged.
    """
    refuse_special(path, ModelError)
    refuse_hollow(path, ModelError)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MOST_HEADER, size - 8):
                raise ModelError(f"{path}: truncated or not safetensors: {size:,} bytes. Copy the file again.")
            header = json.loads(file.read(length))
        return {name: _entry(path, entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"}
    except OSError as e:
        raise ModelError(f"{path}: can't be read ({e.strerror}).") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ModelError(f"{path}: damaged: its header can't be read ({e!r:.100}). Copy the file again.") from e


def write_in_turn(
    path: Path,
    layout: Mapping[str, tuple[str, Sequence[int], int]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file atomically, each tensor as it comes, so that a file may be larger than memory. Raises as `write_file`.

    layout: name -> the dtype, the shape and the bytes, of all tensors. tensors: name and bytes, in any order.
    """
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in layout.items():
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the safetensors library does, so that the data is aligned
    with atomic_file(path, end) as temporary, temporary.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        missing = set(layout)
        for name, data in tensors:
            start, stop = header[name]["data_offsets"]
            assert data.nbytes == stop - start, name
            file.seek(8 + len(text) + start)
            file.write(data.data)
            missing.remove(name)
        assert not missing, missing


def _entry(path: Path, entry: dict, data: int, size: int) -> Stored:
    """An entry of the header, checked against the file's size. data: where the tensors' bytes begin."""
    begin, end = map(int, entry["data_offsets"])
    stored = Stored(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), data + begin, data + end)
    if stored.end > size:
        raise ModelError(
            f"{path}: truncated: {size:,} bytes, where its header names {stored.end:,}. Copy the file again."
        )
    if not 0 <= begin <= end or min(stored.shape, default=1) < 0:
        raise ValueError(entry)
    if stored.is_float and math.prod(stored.shape) * np.dtype(FLOATS[stored.dtype]).itemsize != end - begin:
        raise ValueError(entry)
    return stored
