"""Files that were damaged at random get an answer for a user: never a traceback, a hang, or memory without bound.

`MUTATIONS=10000 pytest tests/test_mutations.py` runs the full number; without it a small share.
"""

import os
import random
import resource
import time
from pathlib import Path

import pytest

from lora_ft.adapter.files import save_adapter
from lora_ft.adapter.inject import inject_lora
from lora_ft.adapter.peft import read_adapter
from lora_ft.config import load_config
from lora_ft.data.sources import iter_rows
from lora_ft.errors import ConfigError, DataError, FilesError, ModelError
from lora_ft.saving import is_whole
from tests.families import tiny_model

EACH = int(os.environ.get("MUTATIONS", "800")) // 10
CONFIGS = Path(__file__).parent.parent / "configs"
PIECES = [
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"- ",
    b"&a ",
    b"*a",
    b"!!x ",
    b"#",
    b"\t",
]
PIECES += [b"1e999", b"-1", b".nan", b"NaN", b"null", b"true", b"../../x", b"\xef\xbb\xbf"]
PIECES += [b"9" * 400, b"[" * 3000, b'{"a":' * 3000]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four damages: bytes flipped, cut out, repeated, or replaced by something nasty."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        span = draw.choice([0, 1, 2, 8, 64])
        match draw.randrange(5):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + span]
            case 2:
                data[at:at] = data[at : at + span]
            case 3:
                data[at : at + span] = draw.choice(PIECES)
            case _:
                del data[at : None if draw.random() < 0.2 else at + 1]
    return bytes(data)


def answered(path: Path, original: bytes, read, errors, seed: str) -> None:
    draw = random.Random(seed)
    for n in range(EACH):
        path.write_bytes(mutated(original, draw))
        began = time.monotonic()
        try:
            read()
        except errors as e:
            assert str(e).strip()
        except Exception as e:
            kept = path.read_bytes()[:2000]
            raise AssertionError(f"mutation {n} of {seed}: {type(e).__name__}: {e}\n{kept!r}") from e
        assert time.monotonic() - began < 5, f"mutation {n} of {seed} took too long"


@pytest.fixture(autouse=True)
def bounded():
    """A file of kilobytes may not cost gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "over 1 GiB more"


@pytest.mark.parametrize("name", ["quickstart", "gpt2_sst2", "chat"])
def test_configs(name, tmp_path):
    path = tmp_path / "config.yaml"
    answered(path, (CONFIGS / f"{name}.yaml").read_bytes(), lambda: load_config(path), ConfigError, name)


DATA = {
    "jsonl": b'{"text": "a b c", "label": 0, "n": 1.5}\n{"text": "\\u00e9", "label": 1, "n": null}\n' * 5,
    "json": b'[{"text": "a", "label": 0},\n {"text": "b", "label": [1, 2, {"x": "y"}]}]\n',
    "csv": b'text,label\n"a, ""b""\nc",0\nd,1\n' * 4,
    "tsv": b'text\tlabel\na "b" c\t0\n"d\ne"\t1\n' * 4,
}


@pytest.mark.parametrize("kind", DATA)
def test_data(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    answered(path, DATA[kind], lambda: list(iter_rows(str(path))), DataError, kind)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = tiny_model("gpt2")
    inject_lora(model, ["q", "v"], rank=2, seed=0)
    save_adapter(model, folder, "gpt2", record={"format": 1, "kind": "adapter"})
    return folder


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "lora_ft.json"])
def test_adapters(name, adapter, tmp_path):
    for file in adapter.iterdir():
        if name == "lora_ft.json" or file.name != "lora_ft.json":  # without a record, so that no hash answers first
            (tmp_path / file.name).write_bytes(file.read_bytes())
    original = (adapter / name).read_bytes()
    answered(tmp_path / name, original, lambda: read_adapter(tmp_path), (ModelError, FilesError), name)
    if name == "lora_ft.json":
        answered(tmp_path / name, original, lambda: is_whole(tmp_path), (FilesError,), "whole")
