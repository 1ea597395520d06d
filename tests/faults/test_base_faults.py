"""Rows 16, 19, 20, 21, 31, 32, 34 of the fault matrix: bases and tokenizers."""

import json
import os
import pickle
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lora_ft.model.stored import is_finite
from tests.helpers.command import TRAIN, cli, files, refused, refused_untouched, train, training
from tests.helpers.tiny import write_base

EVAL, MERGE, CHECK = ("eval",), ("merge", "--adapter", "out"), ("check", "config.yaml")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def long_header(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


def scrambled_header(data: bytes) -> bytes:
    return data[:8] + b"\x00" * 64 + data[72:]


# ---- 16: cut, damaged, a shard missing ----


@pytest.mark.parametrize("damage", [cut, long_header, scrambled_header, lambda data: b""])
def test_weights_that_are_damaged(folder, damage):
    weights = folder / "base/model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    for command in (training("output=other"), EVAL, MERGE):
        refused_untouched(folder, 4, "base/model.safetensors", command=command)


@pytest.mark.parametrize("content", ['{"weight_map": 3}', "[]", "{", "[" * 100_000, '{"weight_map": {"a": 7}}'])
def test_an_index_that_is_none(fresh, content):
    (fresh / "base/model.safetensors.index.json").write_text(content)
    refused_untouched(fresh, 4, "model.safetensors.index.json")


def test_a_missing_shard(fresh):
    (fresh / "base/model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    refused_untouched(fresh, 4, "base/model-00001-of-00002.safetensors", "missing")


def test_a_missing_tensor(fresh):
    weights, name = fresh / "base/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in load_file(weights).items() if k != name}, weights, {"format": "pt"})
    refused_untouched(fresh, 4, name, "missing")
    refused(cli(fresh, *CHECK), 4, name, "missing")


def test_a_tensor_of_the_wrong_shape(fresh):
    weights, name = fresh / "base/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, weights, {"format": "pt"})
    refused_untouched(fresh, 4, name, "another shape")
    refused(cli(fresh, *CHECK), 4, name, "another shape")


# ---- 21: NaN and inf ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(folder, value):
    weights, name = folder / "base/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    tensors[name][3, 2] = value
    save_file(tensors, weights, {"format": "pt"})
    refused_untouched(folder, 4, name, "NaN or inf", command=training("output=other"))
    refused_untouched(folder, 4, name, "NaN or inf", command=[*MERGE, "--other-base"])


# ---- 19, 20: another base, another tokenizer ----


@pytest.mark.parametrize("command", [EVAL, MERGE, (*training("train.num_train_epochs=3"), "--resume")])
def test_another_base_with_the_same_shapes(folder, command):
    trained_on = json.loads((folder / "out/lora_ft.json").read_text())["base"]["fingerprint"]
    shutil.rmtree(folder / "base")
    write_base(folder / "base", seed=7)
    refused_untouched(folder, 4, "fingerprint", trained_on[:12], "--other-base", command=command)
    insisted = cli(folder, *command, "--other-base")
    assert insisted.code == 0 and "warning" in insisted.err and trained_on[:12] in insisted.err
    if command == MERGE:
        assert json.loads((folder / "out-merged/lora_ft.json").read_text())["other_base"] is True


@pytest.mark.parametrize("command", [EVAL, MERGE, (*training("train.num_train_epochs=3"), "--resume")])
def test_a_tokenizer_that_changed(folder, command):
    path = folder / "base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    refused_untouched(folder, 4, "tokenizer", command=command)


# ---- 31: pickles ----


@pytest.fixture
def pickled(folder):
    """The same base, its weights a pickle."""
    weights = folder / "base/model.safetensors"
    torch.save(load_file(weights), folder / "base/pytorch_model.bin")
    weights.unlink()
    return folder


def test_a_pickled_base_is_not_opened_unless_allowed(pickled):
    for command in (training("output=other"), ("check", *training("output=other")[1:]), (*EVAL, "--other-base"), MERGE):
        refused_untouched(pickled, 4, "pytorch_model.bin", "--allow-pickle", "weights_only", command=command)


def test_a_pickled_base_that_is_allowed(pickled):
    assert cli(pickled, "check", *training("output=other")[1:], "--allow-pickle").code == 0
    ended = train(pickled, "output=other", flags=("--allow-pickle",))
    assert ended.code == 0, ended
    # the same weights, so the same adapter; another fingerprint, for other files
    adapter = "adapter_model.safetensors"
    assert (pickled / "other" / adapter).read_bytes() == (pickled / "out" / adapter).read_bytes()
    assert cli(pickled, "eval", "other", "--allow-pickle").code == 0
    merged = cli(pickled, "merge", "--adapter", "other", "--allow-pickle")
    assert merged.code == 0, merged
    assert {p.suffix for p in (pickled / "other-merged").iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert cli(pickled, "eval", "other-merged").code == 0
    tensors = torch.load(pickled / "base/pytorch_model.bin", weights_only=True)
    torch.save({k: v * 1.5 for k, v in tensors.items()}, pickled / "base/pytorch_model.bin")
    refused_untouched(pickled, 4, "fingerprint", command=("eval", "other", "--allow-pickle"))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_pickle_that_would_run_code(pickled, save):
    save({"lm_head.weight": Payload()}, pickled / "base/pytorch_model.bin")
    for flags in ((), ("--allow-pickle",)):
        refused_untouched(pickled, 4, "pytorch_model.bin", command=[*training("output=other"), *flags])
    assert not list(pickled.rglob("ran"))


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 cut"])
def test_a_damaged_pickle(pickled, content):
    (pickled / "base/pytorch_model.bin").write_bytes(content)
    refused_untouched(pickled, 4, "base/pytorch_model.bin", command=[*training("output=other"), "--allow-pickle"])


# ---- 32: names that lead out of the folder ----


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors"])
@pytest.mark.parametrize(("index", "flags"), [("model.safetensors", ()), ("pytorch_model.bin", ("--allow-pickle",))])
def test_an_index_that_leads_outside(fresh, name, index, flags):
    (fresh / "base/model.safetensors").rename(fresh / "secret.safetensors")
    (fresh / f"base/{index}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused_untouched(fresh, 4, f"{index}.index.json", name, command=[*training(), *flags])


def test_links_as_the_hubs_cache_has_them_are_fine(fresh):
    (fresh / "blobs").mkdir()
    (fresh / "base/model.safetensors").rename(fresh / "blobs/0123")
    (fresh / "base/model.safetensors").symlink_to("../blobs/0123")
    assert train(fresh, "train.max_steps=1").code == 0


# ---- 34: code of the base's own ----


def ask_for_code(base, **more) -> None:
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}} | more
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text("open('ran', 'w').close()\n")


def test_code_of_the_bases_own_is_not_run(fresh):
    ask_for_code(fresh / "base", model_type="own")
    refused_untouched(fresh, 4, "its own Python code", "--trust-remote-code")


def test_transformers_own_class_is_taken_where_there_is_one(fresh):
    ask_for_code(fresh / "base")
    ended = train(fresh, "train.max_steps=1")
    assert ended.code == 0, ended
    assert not list(fresh.rglob("ran"))


def test_code_is_run_when_trusted(fresh):
    ask_for_code(fresh / "base")
    own = "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (fresh / "base/own.py").write_text((fresh / "base/own.py").read_text() + own)
    ended = train(fresh, "train.max_steps=1", flags=("--trust-remote-code",))
    assert (fresh / "ran").exists(), ended


def test_a_base_that_is_no_causal_language_model(fresh):
    before = files(fresh)
    (fresh / "base/config.json").write_text('{"model_type": "t5"}')
    refused(train(fresh), 4, "base")
    (fresh / "base/config.json").write_text('{"model_type": ')
    refused(train(fresh), 4, "base")
    (fresh / "base/config.json").write_bytes(before["base/config.json"])
    assert files(fresh) == before


# ---- 16 and 20 beyond the weights: the small files, and what doesn't fit together ----


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [cut, lambda data: b"", lambda data: b"[1]", lambda data: b"[" * 100_000])
def test_small_files_that_are_damaged(folder, name, damage):
    path = folder / "base" / name
    path.write_bytes(damage(path.read_bytes()))
    refused_untouched(folder, 4, f"base/{name}", command=training("output=other"))
    refused_untouched(folder, 4, f"base/{name}", command=MERGE)


@pytest.mark.parametrize(
    "name, setting, words",
    [
        ("tokenizer_config.json", {"model_max_length": "many"}, "model base: its tokenizer can't be loaded"),
        ("generation_config.json", {"eos_token_id": "</s>"}, 'eos_token_id is "</s>", not a token id'),
        ("config.json", {"vocab_size": 0}, "vocab_size is 0, not a number of tokens"),
    ],
)
def test_settings_of_a_wrong_type(fresh, name, setting, words):
    path = fresh / "base" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    refused_untouched(fresh, 4, words)


def test_a_tokenizer_with_an_absurd_id(fresh):
    path = fresh / "base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["z"] = 2**31
    path.write_text(json.dumps(tokenizer))
    refused_untouched(fresh, 4, "model base: its tokenizer of", "has the id 2,147,483,648")


def test_weights_of_another_shape_than_the_config_says(fresh):
    config = json.loads((fresh / "base/config.json").read_text())
    (fresh / "base/config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    refused_untouched(fresh, 4, "model.layers.0.mlp.up_proj.weight is (40, 32), its config says (48, 32)")


def test_a_tokenizer_of_more_ids_than_the_weights_know(folder):
    path = folder / "base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)
    tokenizer["added_tokens"].append({"id": len(tokenizer["model"]["vocab"]), "content": "good", **flags})
    path.write_text(json.dumps(tokenizer))
    refused_untouched(folder, 4, "the model has only", command=training("output=other"))
    refused_untouched(folder, 4, "the model has only", command=("eval", "--other-base"))


@pytest.mark.parametrize(("family", "code"), [("gpt2", 2), ("opt", 2), ("gptj", 2), ("llama", 0)])
def test_rows_longer_than_the_base_has_positions(folder, family, code):
    """Positions of a table end there, and nothing of an earlier run is lost; computed ones go on."""
    shutil.rmtree(folder / "base")
    write_base(folder / "base", family)
    positions = AutoConfig.from_pretrained(folder / "base").max_position_embeddings
    row = {"text": "good " * positions, "label": 1}
    (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 4)
    longer = (*training(f"data.max_length={positions + 1}", "train.max_steps=1"), "--overwrite")
    if code:
        refused_untouched(folder, code, "data.max_length", f"to {positions} at most", command=longer)
        longer = (*training(f"data.max_length={positions}", "train.max_steps=1"), "--overwrite")
    ended = cli(folder, *longer)
    assert ended.code == 0 and ("positions" in ended.err) == (code == 0), ended


def test_a_chat_template_that_changed(fresh):
    """A warning where ids are scored or merged; a run that began with other chats can't go on."""
    for name, answer in (("train.jsonl", "ho"), ("eval.jsonl", "hey")):
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        (fresh / name).write_text((json.dumps({"messages": turns}) + "\n") * 8)
    (fresh / "config.yaml").write_text(
        "model: {name: base}\ndata: {train: train.jsonl, eval: eval.jsonl, messages: messages}\n"
        "train: {batch_size: 4, report_to: []}\n"
    )
    refused_untouched(fresh, 4, "chat template", "data.chat_template")
    template = fresh / "base/chat_template.jinja"
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    text += "{% if add_generation_prompt %}assistant: {% endif %}"
    template.write_text(text)
    assert train(fresh).code == 0
    unchanged = cli(fresh, *EVAL)
    assert unchanged.code == 0 and "warning" not in unchanged.err
    template.write_text(text.replace(": ", " says "))
    for command in (EVAL, MERGE):
        ended = cli(fresh, *command)
        assert ended.code == 0 and "warning" in ended.err and "chat template has changed" in ended.err
    longer = [*training("train.num_train_epochs=2"), "--resume"]
    refused_untouched(fresh, 4, "chat template has changed", command=longer)
    template.write_text(text)
    assert cli(fresh, *longer).code == 0


# ---- the base is the base ----


def base_loss(folder, *changes):
    ended = train(folder, "train.max_steps=1", "train.evaluate_base=true", *changes)
    assert ended.code == 0, ended
    return re.search(r"base model evaluation .*: (loss \S+),", ended.err)[1]


def test_an_adapter_in_a_base_is_not_applied(folder):
    assert find_spec("peft")  # without it transformers would not apply one either
    loss = base_loss(folder, "output=first")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "out" / name, folder / "base" / name)
    assert base_loss(folder, "output=second") == loss


@pytest.mark.parametrize(
    "setting",
    [{"attn_implementation": "flash_attention_2"}, {"experts_implementation": "x"}, {"transformers_weights": "x"}],
)
def test_a_config_can_not_choose_kernels_or_files(fresh, setting):
    change_config(fresh, **setting)
    assert cli(fresh, "check", "config.yaml").code == 0


def test_two_sets_of_weights(fresh):
    weights = fresh / "base/model.safetensors"
    shutil.copy(weights, fresh / "base/other.safetensors")
    index = fresh / "base/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(weights), "other.safetensors")}))
    refused_untouched(fresh, 4, "index.json", "beside it")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_integers(fresh, dtype):
    weights, name = fresh / "base/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    save_file(tensors | {name: (tensors[name] * 100).to(dtype)}, weights, {"format": "pt"})
    refused_untouched(fresh, 4, name, "integers")
    refused(cli(fresh, *CHECK), 4, name, "integers")


def test_integers_beside_the_weights_are_ignored(fresh):
    """Old files have masks in them."""
    weights = fresh / "base/model.safetensors"
    save_file(load_file(weights) | {"model.mask": torch.ones(4, dtype=torch.uint8)}, weights, {"format": "pt"})
    assert train(fresh, "train.max_steps=1").code == 0


def test_a_float8_tensor_can_be_checked_for_nan():
    values = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert is_finite(values[:1]) and not is_finite(values)


def change_config(folder, **settings):
    path = folder / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "setting", [{"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 1e9}}, {"vocab_size": 10**12}]
)
def test_a_config_of_an_absurd_size(fresh, setting):
    change_config(fresh, **setting)
    for command in (TRAIN, ("check", "config.yaml")):
        ended = cli(fresh, *command)
        refused(ended, 4, "base", "Copy the")
        assert ended.seconds < 10


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_gigabytes_that_hold_nothing(fresh, name):
    with (fresh / "base" / name).open("wb") as file:
        file.truncate(2**33)
    ended = cli(fresh, "check", "config.yaml")
    refused(ended, 4, f"base/{name}")
    assert ended.seconds < 10


@pytest.mark.parametrize("name", ["base/model.safetensors", "base/pytorch_model.bin"])
def test_weights_are_refused_before_data_is_read(fresh, name):
    (fresh / "base/model.safetensors").rename(fresh / name)
    (fresh / name).write_bytes(b"x" * 100)
    (fresh / "train.jsonl").write_text("not JSON")
    flags = ("--allow-pickle",) if name.endswith(".bin") else ()
    refused_untouched(fresh, 4, name, command=(*TRAIN, *flags))
