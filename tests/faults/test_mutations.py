"""Files that were damaged at random get an answer for a user: never a traceback, a hang, or memory without bound.

`MUTATIONS=10000 pytest tests/test_mutations.py` runs the full number; without it a small share.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_ft.commands.inspect.command import inspect_command
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, DataError, FilesError, ModelError
from lora_ft.core.run_folder import read_record
from lora_ft.core.storage import manifest, write_json
from lora_ft.data.encode import load_examples
from lora_ft.data.examples import Examples
from lora_ft.data.sources import iter_rows
from lora_ft.data.template import Template
from lora_ft.methods.lora.inject import inject_lora
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained, check_base
from lora_ft.model.files import resolve
from lora_ft.training.checkpoint import State
from lora_ft.training.resume import announce_resume, check_data, find_starting_point, newest_checkpoint
from tests.helpers.families import tiny_model
from tests.helpers.tiny import CONFIG, save_with_record, tiny_tokenizer, write_run

KINDS = 35  # tests below
EACH = -(-int(os.environ.get("MUTATIONS", "640")) // KINDS)
SECONDS = 5  # for each; most take a few milliseconds
CONFIGS = Path(__file__).parent.parent / "configs"
PIECES = b"\0 \xff \n \" ' { } [ ] : , - &a *a !!x # \t ../../x \xef\xbb\xbf null true".split(b" ")
PIECES += [b"<<: *a", b"!!python/object/apply:os.system [x]", b"\xed\xa0\x80", b"\\ud800", b"\r", b"\xc2\x85"]
PIECES += [b"[" * 3000, b'{"a":' * 3000, b"{a: " * 3000, b"- " * 3000]
NUMBERS = [
    b"9" * 5000,
    b"1e999",
    b"-1",
    b"0",
    b".nan",
    b"NaN",
    b"-Infinity",
    b"1e-400",
    b"18446744073709551616",
    b"0x7f",
]
TOKEN = re.compile(rb"[A-Za-z0-9_.+-]+")
NUMBER = re.compile(rb"\d+(\.\d+)?")


class TooSlow(BaseException):
    """Not an Exception: nothing on the way may take it for an error in the file."""


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four damages: bytes flipped, cut, repeated, replaced; tokens swapped; numbers made huge; nesting."""
    for _ in range(draw.randint(1, 4)):
        at, span = draw.randrange(len(data) + 1), draw.choice([0, 1, 2, 8, 64])
        before, after = data[:at], data[at:]
        match draw.randrange(8):
            case 0 if after:
                data = before + bytes([after[0] ^ 1 << draw.randrange(8)]) + after[1:]
            case 1:
                data = before + after[span:]
            case 2:
                data = before + after[:span] + after
            case 3:
                data = before + draw.choice(PIECES) + after[span:]
            case 4 if draw.random() < 0.3:
                data = before
            case 5 if found := list(NUMBER.finditer(data)):
                number = draw.choice(found)
                data = data[: number.start()] + draw.choice(NUMBERS) + data[number.end() :]
            case 6 if len(tokens := list(TOKEN.finditer(data))) > 1:
                a, b = sorted(draw.sample(tokens, 2), key=lambda m: m.start())
                data = data[: a.start()] + b[0] + data[a.end() : b.start()] + a[0] + data[b.end() :]
            case _:
                deep = draw.choice([2, 50, 2000])
                data = before + b"[" * deep + after[:span] + b"]" * deep + after[span:]
    return data


def answered(path: Path, original: bytes, read, errors, seed: str) -> None:
    draw = random.Random(seed)
    for n in range(EACH):
        path.write_bytes(mutated(original, draw))
        signal.alarm(SECONDS)
        try:
            read()
        except errors as e:
            assert str(e).strip() and len(str(e)) < 20_000
        except (Exception, TooSlow) as e:
            kept = path.read_bytes()[:2000]
            raise AssertionError(f"mutation {n} of {seed}: {type(e).__name__}: {str(e)[:300]}\n{kept!r}") from e
        finally:
            signal.alarm(0)


@pytest.fixture(autouse=True)
def bounded():
    """A file of kilobytes may cost neither gigabytes nor minutes."""

    def too_slow(signum, frame):
        raise TooSlow

    handler = signal.signal(signal.SIGALRM, too_slow)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "over 1 GiB more"


OWN = {
    "own": CONFIG.encode(),
    "full": CONFIG.encode() + b"seed_comment: &a [1]\ntrainer: {adam_beta2: 0.9}\noutput: out\n",
}
YAMLS = {p.stem: p.read_bytes() for p in CONFIGS.glob("*.yaml")} | OWN


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_configs(name, tmp_path):
    path = tmp_path / "config.yaml"
    answered(path, YAMLS[name], lambda: load_config(path), ConfigError, name)


DATA = {
    "jsonl": b'{"text": "a b c", "label": 0, "n": 1.5}\n{"text": "\\u00e9", "label": 1, "n": null}\n' * 5,
    "json": b'[{"text": "a", "label": 0},\n {"text": "b", "label": [1, 2, {"x": "y"}]}]\n',
    "csv": b'text,label\n"a, ""b""\nc",0\nd,1\n' * 4,
    "tsv": b'text\tlabel\na "b" c\t0\n"d\ne"\t1\n' * 4,
}
CHATS = b'{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}\n' * 4
CHATML = "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' + '\n' }}{% endfor %}"


@pytest.mark.parametrize("kind", DATA)
def test_data(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    answered(path, DATA[kind], lambda: list(iter_rows(str(path))), DataError, kind)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.parametrize("kind", [*DATA, "chat"])
def test_examples(kind, bad_rows, tokenizer, tmp_path):
    if kind == "chat":
        template, path, original = Template(messages="messages", chat_template=CHATML), tmp_path / "data.jsonl", CHATS
    else:
        words = {"label": ["negative", "positive"]}
        template = Template(prompt="Review: {text}", completion=" {label}", label_names=words)
        path, original = tmp_path / f"data.{kind}", DATA[kind]

    def read():
        load_examples([str(path)], template, tokenizer, max_length=64, bad_rows=bad_rows)

    # a column that a template needs and the data lacks is the template's fault as much as the file's
    answered(path, original, read, (DataError, ConfigError), f"{kind} {bad_rows}")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = tiny_model("gpt2")
    inject_lora(model, ["q", "v"], rank=2, seed=0)
    save_with_record(model, folder, "gpt2")
    return folder


@pytest.mark.parametrize(
    "read", [lambda folder: read_adapter(Trained.open(folder)), lambda folder: inspect_command([folder])]
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "lora_ft.json"])
def test_adapters(name, read, adapter, tmp_path):
    for file in adapter.iterdir():
        if name == "lora_ft.json" or file.name != "lora_ft.json":  # without a record, so that no hash answers first
            (tmp_path / file.name).write_bytes(file.read_bytes())
    answered(
        tmp_path / name,
        (adapter / name).read_bytes(),
        lambda: read(tmp_path),
        (ModelError, FilesError),
        name,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """output/checkpoints/step-3 of a run."""
    from lora_ft.commands.train import train

    folder = write_run(tmp_path_factory.mktemp("run"), "gpt2")
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(load_config("config.yaml", ["train.max_steps=3", "train.save_steps=3"]))
    finally:
        os.chdir(here)
    return folder / "out/checkpoints/step-3"


@pytest.mark.parametrize("name", ["adapter_config.json", "state.safetensors", "state.json", "lora_ft.json"])
def test_checkpoints(name, checkpoint, tmp_path):
    target = tmp_path / "checkpoints/step-3"
    shutil.copytree(checkpoint, target)
    answered(target / name, (checkpoint / name).read_bytes(), lambda: newest_checkpoint(tmp_path), FilesError, name)


@pytest.mark.parametrize("ended", [False, True])
def test_records_that_a_run_goes_on_from(ended, checkpoint, tmp_path):
    """No hash covers lora_ft.json itself: what is in it beside its manifest is read with care."""
    run = shutil.copytree(checkpoint.parents[2], tmp_path / "run")
    path = (run / "out" if ended else run / "out/checkpoints/step-3") / "lora_ft.json"
    if not ended:
        (run / "out/lora_ft.json").unlink()
    config = load_config(run / "config.yaml", ["train.max_steps=4", "train.save_steps=3"])
    base, record = resolve(str(run / "base"), None), json.loads(path.read_text())
    data = Examples(None, SimpleNamespace(**record["data"]["train"]), [], [])

    def read():
        begin = find_starting_point(run / "out", config, True, False)
        before = read_record(begin)
        if before["kind"] == "checkpoint":
            check_base(before, base, False)
            check_data(before, record["tokenizer"], data, {})
            with redirect_stderr(StringIO()):
                announce_resume(before, record, State.read(begin), 4, run / "out")

    answered(path, path.read_bytes(), read, (ConfigError, DataError, ModelError, FilesError), f"record {ended}")


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_states_whose_manifest_agrees(name, checkpoint, tmp_path):
    """As if another tool had changed a checkpoint and its hashes: no bytes may lead to more than an error."""
    target = tmp_path / "step-3"
    shutil.copytree(checkpoint, target)

    def read():
        write_json(target / "lora_ft.json", {"files": manifest(target, [name])})
        State.read(target)

    answered(target / name, (checkpoint / name).read_bytes(), read, (ModelError, FilesError), f"state {name}")
