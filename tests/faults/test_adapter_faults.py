"""Rows 17, 18, 21, 31, 32, 37, 41 of the fault matrix: adapters and their merge. In depth in tests/adapter/."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.command import cli, files, refused, refused_untouched, start, training

WEIGHTS, CONFIG, RECORD = "out/adapter_model.safetensors", "out/adapter_config.json", "out/lora_ft.json"
EVAL, MERGE = ("eval",), ("merge", "--adapter", "out")
FROM_IT = (*training("adapter.init_from=out", "output=other"),)
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def peft(folder):
    """The adapter as another tool leaves it: no record, so no manifest that would catch a change first."""
    for path in (folder / RECORD, *(folder / "out/checkpoints").rglob("lora_ft.json")):
        path.unlink()
    return folder


def everywhere_refused(folder, *words: str, code: int = 4) -> None:
    evaluated = ("eval", "out", "--config", "config.yaml")
    for command in (evaluated, (*MERGE, "--base", "base"), FROM_IT):
        refused_untouched(folder, code, *words, command=command)


# ---- 17: cut, changed ----


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("change", ["flip", "cut", "delete", "empty"])
def test_files_that_changed_since_the_manifest(folder, name, change):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes({"flip": data, "cut": data[:100]}.get(change, b""))
    if change == "delete":
        (folder / name).unlink()
    commands = (MERGE, FROM_IT) if change == "delete" and name == CONFIG else (EVAL, MERGE, FROM_IT)
    for command in commands:
        refused_untouched(folder, 4, name, command=command)


def test_the_state_of_a_checkpoint_that_changed(folder):
    """Its adapter alone is whole, but a checkpoint is all of its files or none."""
    step = sorted(p.name for p in (folder / "out/checkpoints").iterdir())[-1]
    name = f"out/checkpoints/{step}/state.safetensors"
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    for command in (("eval", f"out/checkpoints/{step}"), ("merge", "--adapter", f"out/checkpoints/{step}")):
        refused_untouched(folder, 4, name, command=command)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b'\x10\0\0\0\0\0\0\0{"a": not JSON   '])
def test_weights_that_are_none(peft, content):
    (peft / WEIGHTS).write_bytes(content)
    everywhere_refused(peft, WEIGHTS)


def changed(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_a_tensor_of_the_wrong_shape(peft):
    changed(peft, lambda tensors: tensors.update({KEY: tensors[KEY][:, :-1].contiguous()}))
    everywhere_refused(peft, WEIGHTS, KEY, "(4, 31)", "(4, 32)")


# ---- 18: names missing or too many ----


def test_names_missing_and_too_many(peft):
    other = KEY.replace("layers.1", "layers.7")

    def rename(tensors):
        for letter in "AB":
            old = KEY.replace("lora_A", f"lora_{letter}")
            tensors[old.replace("layers.1", "layers.7")] = tensors.pop(old)

    changed(peft, rename)
    path = peft / CONFIG
    path.write_text(path.read_text().replace("layers.1", "layers.7"))
    everywhere_refused(
        peft, WEIGHTS, "missing", "unexpected", other.split(".lora")[0].removeprefix("base_model.model.")
    )
    changed(peft, lambda tensors: tensors.pop(other))
    everywhere_refused(peft, WEIGHTS, "missing", other)
    changed(peft, lambda tensors: tensors.update({"who.knows": torch.zeros(1)}))
    everywhere_refused(peft, WEIGHTS, "unexpected", "who.knows")


# ---- 21: NaN and inf ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(peft, value):
    changed(peft, lambda tensors: tensors[KEY].__setitem__((0, 0), value))
    everywhere_refused(peft, WEIGHTS, KEY, "NaN or inf")


# ---- 31, 32: pickles, names that lead outside ----


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickled_adapter_is_never_opened(peft, name):
    (peft / WEIGHTS).rename(peft / "out" / name)
    everywhere_refused(peft, f"out/{name}", "pickle")


@pytest.mark.parametrize("name", ["../train.jsonl", "/etc/hostname", "a/../../train.jsonl", "..\\train.jsonl"])
def test_a_manifest_that_leads_outside(folder, name):
    record = json.loads((folder / RECORD).read_text())
    record["files"][name] = {"size": 1, "sha256": "0"}
    (folder / RECORD).write_text(json.dumps(record))
    for command in (EVAL, MERGE, FROM_IT, (*training(), "--overwrite")):
        code = 6 if "--overwrite" in command else 4
        refused_untouched(folder, code, "leads out of the folder", command=command)


# ---- 37: adapter_config ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 8}, ["rank 8"]),
        ({"r": 0}, ["r"]),
        ({"r": 10**12}, ["r"]),
        ({"r": "4"}, ["r"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha"]),
        ({"peft_type": "IA3"}, ["IA3"]),
        ({"use_dora": "yes"}, ["use_dora"]),
    ],
)
def test_adapter_configs(peft, change, words):
    config = json.loads((peft / CONFIG).read_text()) | change
    (peft / CONFIG).write_text(json.dumps(config))
    began = time.monotonic()
    everywhere_refused(peft, "adapter_config.json", *words)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"r": ', b"\xff\xfe", b'{"a":' * 100_000, b"[" * 100_000, b'"' + b"x" * (17 * 2**20) + b'"'],
)
@pytest.mark.parametrize("name", [CONFIG, RECORD])
def test_json_that_is_none(folder, name, content):
    if name == CONFIG:
        (folder / RECORD).unlink()
        for path in (folder / "out/checkpoints").rglob("lora_ft.json"):
            path.unlink()
    (folder / name).write_bytes(content)
    for command in (EVAL, MERGE, FROM_IT):
        refused_untouched(folder, 4, name, command=command)


# ---- 36, 41: a merge that is killed, or fails its verification ----


def test_a_merge_whose_matrices_are_wrong(folder):
    def lie():
        from lora_ft.methods.lora import merge_shards

        merge_shards.matrix_error = lambda *_: (1.0, float("inf"))

    before = files(folder)
    refused(cli(folder, *MERGE, before=lie), 4, "verification")
    assert files(folder) == before


def test_a_merge_whose_logits_part(folder):
    def lie():
        from lora_ft.methods.lora import merge

        write = merge.write_shards

        def damaged(shards, staged, *rest):
            done = write(shards, staged, *rest)
            path = staged / shards[0].name
            tensors = load_file(path)
            tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.5
            save_file(tensors, path, {"format": "pt"})
            return done

        merge.write_shards = damaged

    before = files(folder)
    refused(cli(folder, *MERGE, before=lie), 4, "verification", "position", "logits")
    assert files(folder) == before
    assert not list(folder.glob(".out-merged*"))


@pytest.mark.parametrize("moment", ["write_shards", "copy_files", "compare_logits", "write_record"])
def test_a_merge_that_is_killed(folder, moment):
    def die():
        from lora_ft.methods.lora import merge

        done = getattr(merge, moment)

        def killed(*arguments, **more):
            done(*arguments, **more)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(merge, moment, killed)

    before = files(folder)
    command = start(folder, *MERGE, before=die)
    assert command.end().code == -signal.SIGKILL
    assert not (folder / "out-merged").exists()
    assert {k: v for k, v in files(folder).items() if not k.startswith(".out-merged")} == before
    again = cli(folder, *MERGE)
    assert again.code == 0 and not list(folder.glob(".out-merged*")), again


def test_a_merge_over_something_that_is_there(folder):
    (folder / "out-merged").mkdir()
    (folder / "out-merged/mine.txt").write_text("mine")
    refused_untouched(folder, 6, "out-merged", command=MERGE)
    refused_untouched(folder, 6, "config.yaml", command=(*MERGE, "--output", "config.yaml"))
