"""Files that hold nothing are refused before they are read."""

import os

import pytest

from lora_ft.core.errors import DataError, ModelError
from lora_ft.core.paths import refuse_hollow
from lora_ft.core.storage import read_tensors, verify_manifest
from lora_ft.data.sources import content_hash
from lora_ft.model.files import resolve

pytestmark = pytest.mark.skipif(
    not hasattr(os, "SEEK_DATA"), reason="Windows can't tell the holes of a file (no os.SEEK_DATA)"
)


def sparse(path, size=2**36, data=b"", at=0):
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(at)
        file.write(data)
    return path


@pytest.mark.parametrize("data, at", [(b"", 0), (b"{}" * 2**16, 0), (b"end", 2**36 - 3)])
def test_a_sparse_file_of_gigabytes(tmp_path, data, at):
    path = sparse(tmp_path / "x.jsonl", data=data, at=at)
    with pytest.raises(DataError, match=r"x\.jsonl: 64\.0 GiB, of which only .* were ever written"):
        refuse_hollow(path, DataError)


@pytest.mark.parametrize("size, data", [(2**29, b""), (2**30, b"x" * 2**26)])
def test_files_that_are_read(tmp_path, size, data):
    refuse_hollow(sparse(tmp_path / "x", size, data), DataError)
    refuse_hollow(tmp_path / "missing", DataError)


def test_nothing_reads_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights, rows = sparse(tmp_path / "model.safetensors"), sparse(tmp_path / "rows.csv")
    manifest = {weights.name: {"size": 2**36, "sha256": "0"}}
    for error, read in (
        (ModelError, lambda: read_tensors(weights)),
        (ModelError, lambda: verify_manifest(tmp_path, manifest, ModelError)),
        (ModelError, lambda: resolve(str(tmp_path))),
        (DataError, lambda: content_hash(str(rows))),
    ):
        with pytest.raises(error, match="ever written"):
            read()
