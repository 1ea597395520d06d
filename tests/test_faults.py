"""Every kind of fault through the real command line: exit code, one message that says where, nothing else touched.

A command runs in a fork of this process, which has imported everything: fast, and still real signals, limits and exit codes.
"""

import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_ft.adapter.merge
import lora_ft.check
import lora_ft.evaluate
import lora_ft.train  # noqa: F401 (imported once, before the forks)
from lora_ft.cli import main
from tests.base import write_base, write_run

TRAIN = ("train", "config.yaml")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def start(folder: Path, *arguments: str, before=lambda: None) -> int:
    """Fork `lora-ft ARGUMENTS` in `folder`; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        for stream, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        sys.argv = ["lora-ft", *arguments]
        torch.set_num_threads(1)
        before()
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException as e:  # noqa: BLE001 (what a shell would show)
        print(f"Traceback: {type(e).__name__}: {e}", file=sys.stderr)
        code = 1
    os._exit(code)


def end(folder: Path, pid: int) -> Ended:
    status = os.waitpid(pid, 0)[1]
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    out, err = ((folder / name).read_text() for name in ("stdout.txt", "stderr.txt"))
    assert "Traceback" not in err, err
    return Ended(code, out, err)


def cli(folder: Path, *arguments: str, before=lambda: None) -> Ended:
    return end(folder, start(folder, *arguments, before=before))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base, data, config, and the output of a run that has ended."""
    folder = write_run(tmp_path_factory.mktemp("faults"))
    assert cli(folder, *TRAIN).code == 0
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def fresh(folder):
    shutil.rmtree(folder / "out")
    return folder


def refused(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended
    for word in words:
        assert word in ended.err, (word, ended.err)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- config (1 to 8): in depth in test_config.py ----


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("train: {lerning_rate: 1}", ["config.yaml:", "lerning_rate", "learning_rate"]),
        ("adapter: {rank: 1000000000000}", ["rank", "65536"]),
        ("adapter: {rank: 0, dropout: 1.5, alpha: .nan}", ["rank", "dropout", "alpha"]),
        ("adapter: {targets: [q_proj]}", ["q_proj", "nearest", "modules"]),
        ("output: !!python/object:os.system x", ["config.yaml:"]),
        ("output: " + "[" * 10_000, ["config.yaml:"]),
    ],
)
def test_configs(fresh, edit, words):
    key = edit.split(":")[0]
    lines = [line for line in (fresh / "config.yaml").read_text().splitlines() if not line.startswith(f"{key}:")]
    (fresh / "config.yaml").write_text("\n".join([*lines, edit]) + "\n")
    began = time.monotonic()
    refused(cli(fresh, *TRAIN), 2, *words)
    assert time.monotonic() - began < 1.5


def test_roles_and_modules_that_match_nothing(fresh):
    refused(cli(fresh, *TRAIN, "--set", "adapter.modules=[nothing]"), 4, "nothing", "Near")
    shutil.rmtree(fresh / "base")
    write_base(fresh / "base", "gpt2")
    refused(cli(fresh, *TRAIN, "--set", "adapter.targets=[gate]"), 4, "gate", "c_attn")


def test_names_that_lead_nowhere(fresh):
    refused(cli(fresh, "train", "no.yaml"), 2, "no.yaml")
    refused(cli(fresh, *TRAIN, "--set", "data.train=no.jsonl"), 3, "no.jsonl")
    refused(cli(fresh, *TRAIN, "--set", "model.name=./no"), 4, "./no")
    refused(cli(fresh, *TRAIN, "--set", "model.name=some/model"), 4, "HF_HOME", "model.name=FOLDER")
    refused(cli(fresh, *TRAIN, "--set", "data.train=some/data@train"), 3, "HF_HOME")


# ---- data (10 to 15, 38, 40) ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["train.jsonl"]),
        (b"\n \n", ["train.jsonl"]),
        (b'{"text": "a", "label": 0}\n{"text": \n', ["train.jsonl:2", "JSON"]),
        (b'{"text": "a"}\n', ["train.jsonl:1", "label"]),
        (b'{"text": null, "label": 0}\n', ["train.jsonl:1", "null"]),
        (b'{"text": ["a"], "label": 0}\n', ["train.jsonl:1", "a list"]),
        (b'{"text": "a", "label": 2}\n', ["train.jsonl:1", "class 2"]),
        (b'{"text": "a", "label": 0}\n{"text": "\xff"}\n', ["train.jsonl:2", "byte", "UTF-8"]),
        (b'{"text": "a", "label": "\\u001b[31mred"}\n', ["train.jsonl:1", "\\x1b"]),
    ],
)
def test_data(fresh, content, words):
    (fresh / "train.jsonl").write_bytes(content)
    refused(cli(fresh, *TRAIN), 3, *words)
    assert not (fresh / "out").exists()


def test_bad_rows_are_skipped_and_counted_when_asked(fresh):
    with (fresh / "train.jsonl").open("a") as f:
        f.write('{"text": null, "label": 0}\n')
    ended = cli(fresh, *TRAIN, "--set", "data.bad_rows=skip", "--set", "train.max_steps=1")
    assert ended.code == 0 and "1 bad rows skipped" in ended.err and "train.jsonl:49" in ended.err


def test_a_byte_order_mark_is_fine_and_long_rows_are_cut_and_counted(fresh):
    data = (fresh / "train.jsonl").read_bytes()
    (fresh / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + data)
    ended = cli(fresh, *TRAIN, "--set", "data.max_length=12", "--set", "train.max_steps=1")
    assert ended.code == 0 and "truncated" in ended.err


def test_chats_that_cannot_be_rendered(fresh):
    (fresh / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    (fresh / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    (fresh / "config.yaml").write_text(
        "model: {name: base}\ndata: {train: train.jsonl, messages: messages, chat_template: chat.jinja}\n"
    )
    refused(cli(fresh, *TRAIN), 3, "train.jsonl:1")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (fresh / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (fresh / "chat.jinja").write_text("{{ raise_exception('no such role') }}")
    refused(cli(fresh, *TRAIN), 3, "train.jsonl:1", "no such role")


# ---- bases (16, 21, 31, 32, 34) ----


def test_bases_that_are_damaged(fresh):
    weights = fresh / "base/model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\xff" * 8 + whole[8:], b""):
        weights.write_bytes(damaged)
        refused(cli(fresh, *TRAIN), 4, "model.safetensors")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    refused(cli(fresh, *TRAIN), 4, "model.layers.1.mlp.up_proj.weight", "NaN")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    refused(cli(fresh, *TRAIN), 4, "model.layers.1.mlp.up_proj.weight", "missing")


def test_bases_that_lack_a_shard_or_lead_outside(fresh):
    index = fresh / "base/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refused(cli(fresh, *TRAIN), 4, "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(cli(fresh, *TRAIN), 4, "../secret.safetensors")


def test_pickles_are_opened_only_when_allowed_and_run_no_code(fresh):
    tensors = load_file(fresh / "base/model.safetensors")
    (fresh / "base/model.safetensors").unlink()
    torch.save(tensors, fresh / "base/pytorch_model.bin")
    refused(cli(fresh, *TRAIN), 4, "pytorch_model.bin", "--allow-pickle")
    assert cli(fresh, *TRAIN, "--allow-pickle", "--set", "train.max_steps=2").code == 0
    refused(cli(fresh, "eval"), 4, "--allow-pickle")
    assert cli(fresh, "eval", "--allow-pickle").code == 0
    assert cli(fresh, "merge", "--adapter", "out", "--allow-pickle").code == 0
    assert (fresh / "out-merged/model.safetensors").is_file()
    torch.save(Evil(), fresh / "base/pytorch_model.bin")
    refused(cli(fresh, *TRAIN, "--allow-pickle", "--overwrite"), 4, "pytorch_model.bin")
    assert not (fresh / "ran").exists()


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


def test_code_of_a_bases_own_is_never_run(fresh):
    config = json.loads((fresh / "base/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (fresh / "base/config.json").write_text(json.dumps(config))
    (fresh / "base/own.py").write_text("open('ran', 'w')\n")
    refused(cli(fresh, *TRAIN), 4, "--trust-remote-code")
    assert not (fresh / "ran").exists() and not (fresh / "base/ran").exists()


# ---- adapters (17 to 20, 37): in depth in adapter/test_files.py ----


def test_adapters_that_changed(folder):
    weights = folder / "out/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for command in (("eval",), ("merge", "--adapter", "out")):
        refused(cli(folder, *command), 4, "adapter_model.safetensors", "changed")
    weights.write_bytes(data[:100])
    refused(cli(folder, "eval"), 4, "adapter_model.safetensors")
    assert not (folder / "out-merged").exists()


def test_another_base_of_the_same_shapes(folder):
    shutil.rmtree(folder / "base")
    write_base(folder / "base", seed=7)
    for command in (("eval",), ("merge", "--adapter", "out")):
        refused(cli(folder, *command), 4, "fingerprint")
    insisted = cli(folder, "merge", "--adapter", "out", "--other-base")
    assert insisted.code == 0 and "warning" in insisted.err
    assert json.loads((folder / "out-merged/lora_ft.json").read_text())["other_base"] is True


def test_a_tokenizer_that_changed(folder):
    path = folder / "base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    refused(cli(folder, "eval"), 4, "tokenizer")


def test_a_chat_template_that_changed_is_a_warning(fresh):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (fresh / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (fresh / "config.yaml").write_text("model: {name: base}\ndata: {train: train.jsonl, messages: messages}\n")
    refused(cli(fresh, *TRAIN), 4, "chat template")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (fresh / "base/chat_template.jinja").write_text(template)
    assert cli(fresh, *TRAIN).code == 0
    assert "warning" not in cli(fresh, "eval", "--data", "train.jsonl").err
    (fresh / "base/chat_template.jinja").write_text(template.replace(": ", " says "))
    changed = cli(fresh, "eval", "--data", "train.jsonl")
    assert changed.code == 0 and "chat template changed" in changed.err
    refused(cli(fresh, *TRAIN, "--resume", "--set", "train.num_train_epochs=2"), 4, "chat template")


def test_several_processes_that_would_train_alone_are_refused(fresh):
    refused(cli(fresh, *TRAIN, before=lambda: os.environ.update(WORLD_SIZE="2")), 2, "WORLD_SIZE")
    assert not (fresh / "out").exists()


# ---- runs (22, 25, 26, 28 to 30, 35, 39, 42); kills and resume in test_resume.py and test_kill.py ----


def test_numbers_that_leave_the_finite(fresh):
    ended = cli(
        fresh,
        *TRAIN,
        "--set",
        "train.learning_rate=1e30",
        "--set",
        "train.save_steps=1",
        "--set",
        "train.warmup_steps=0",
    )
    refused(ended, 5, "step ", "train.jsonl:")
    for checkpoint in (fresh / "out/checkpoints").glob("step-*"):
        assert all(t.isfinite().all() for t in load_file(checkpoint / "adapter_model.safetensors").values())
    assert not (fresh / "out/adapter_model.safetensors").exists()


def test_a_disk_that_is_full(fresh):
    before = files(fresh)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # noqa: E731
    refused(cli(fresh, *TRAIN, before=limit), 6)
    assert {k: v for k, v in files(fresh).items() if k in before and "std" not in k} == {
        k: v for k, v in before.items() if "std" not in k
    }
    assert not list((fresh / "out/checkpoints").glob("step-*/lora_ft.json"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(fresh, signum, code):
    pid = start(fresh, *TRAIN, "--set", "train.num_train_epochs=300", "--set", "train.eval_steps=7")
    while not (fresh / "out/log.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(pid, signum)
    ended = end(fresh, pid)
    refused(ended, code, "saved", "lora-ft train config.yaml", "--resume")
    assert time.monotonic() - began < 10
    assert list((fresh / "out/checkpoints").glob("step-*/lora_ft.json"))
    refused(cli(fresh, "eval"), 4, "unfinished", "step-")
    refused(cli(fresh, *TRAIN), 6, "--resume", "--overwrite")


def test_a_signal_before_the_first_step_leaves_nothing(fresh):
    def later():
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.15)

    ended = cli(fresh, *TRAIN, "--set", "train.num_train_epochs=300", before=later)
    assert ended.code == 143, ended
    assert not (fresh / "out/adapter_model.safetensors").exists()


def test_outputs_that_cannot_be(fresh):
    (fresh / "file").write_text("mine")
    refused(cli(fresh, *TRAIN, "--set", "output=file"), 6, "file")
    refused(cli(fresh, *TRAIN, "--set", "output=file/inside"), 6)
    assert (fresh / "file").read_text() == "mine"
    refused(cli(fresh, *TRAIN, "--set", "output=base"), 6, "holds a model")
    assert not (fresh / "base/adapter_config.json").exists()


def test_two_runs_into_one_output(fresh):
    (fresh / "out").mkdir()
    with (fresh / "out/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4242")
        lock.flush()
        refused(cli(fresh, *TRAIN), 6, "4242")


def test_modes_follow_the_umask(fresh):
    assert cli(fresh, *TRAIN, "--set", "train.max_steps=1", before=lambda: os.umask(0o027)).code == 0
    modes = {p.stat().st_mode & 0o777 for p in (fresh / "out").rglob("*") if p.is_file()}
    assert modes == {0o640}


def test_no_memory(fresh):
    def limit():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)

    ended = cli(fresh, *TRAIN, "--set", "adapter.rank=65536", "--set", "adapter.targets=[all]", before=limit)
    refused(ended, 7, "micro_batch_tokens")


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a second file system")
def test_an_output_on_another_file_system(fresh):
    output = Path("/dev/shm") / f"lora-ft-test-{os.getpid()}"
    try:
        assert cli(fresh, *TRAIN, "--set", "train.max_steps=2", "--set", f"output={output}").code == 0
        assert (output / "lora_ft.json").is_file()
    finally:
        shutil.rmtree(output, ignore_errors=True)


def test_a_merge_whose_proof_fails_leaves_nothing(folder):
    def lie():
        from lora_ft.adapter import shards

        shards.matrix_error = lambda *_: (1.0, float("inf"))

    refused(cli(folder, "merge", "--adapter", "out", before=lie), 4)
    assert not (folder / "out-merged").exists()
