"""Runs of every method beside LoRA through the commands: train, stop, resume, eval, overwrite, merge, and wrong configs."""

import io
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from lora_ft.commands.check.command import check
from lora_ft.commands.evaluate import evaluate_command
from lora_ft.commands.export.command import export_command
from lora_ft.commands.generate.chat import escape
from lora_ft.commands.generate.command import generate_command
from lora_ft.commands.inspect.command import inspect_command
from lora_ft.commands.merge import merge_command
from lora_ft.commands.train import train, train_together
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, ModelError, UserError
from tests.helpers import ranks
from tests.helpers.tiny import CONFIG, RUN_FILES, write_base, write_run
from tests.training.test_resume import log, until_done

METHODS = {
    "full": "method: full",
    "bottleneck": "method: bottleneck, bottleneck_size: 4",
    "prompt": "method: prompt, virtual_tokens: 3",
}
QUANTIZED = {"bottleneck": "nf4", "prompt": "int8"}
SETTINGS = ["train.micro_batch_tokens=64", "train.logging_steps=5", "train.save_steps=3", "train.eval_steps=4"]
SETTINGS += ["data.max_eval_examples=8"]


def weights(folder: Path) -> Path:
    return next(p for p in (folder / "model.safetensors", folder / "adapter_model.safetensors") if p.exists())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("base"), "gpt2")


@pytest.fixture(scope="module", params=METHODS)
def ran(base, request):
    """(method, a folder in which its run has ended, uninterrupted)."""
    folder = base.parent / request.param
    shutil.copytree(base, folder)
    text = CONFIG.replace("rank: 4, alpha: 8", METHODS[request.param])
    if request.param in QUANTIZED:
        text = text.replace("name: base", f"name: base, quantization: {QUANTIZED[request.param]}")
    (folder / "config.yaml").write_text(text.replace("3.0e-2", "1.0e-1" if request.param == "prompt" else "1.0e-2"))
    run(folder)
    return request.param, folder


def run(folder: Path, *more: str, **how: bool) -> None:
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(load_config("config.yaml", [*SETTINGS, *more]), **how)
    finally:
        os.chdir(here)


def evaluated(folder: Path, what: str, capsys, **how) -> dict:
    here = os.getcwd()
    os.chdir(folder)
    capsys.readouterr()
    try:
        evaluate_command([Path(what)], as_json=True, **how)
    finally:
        os.chdir(here)
    return json.loads(capsys.readouterr().out)


def test_eval_scores_it_beside_its_base_as_the_last_evaluation_did(ran, capsys):
    method, folder = ran
    record = json.loads((folder / "out/lora_ft.json").read_text())
    assert record["config"]["adapter"]["method"] == method and "rank" not in record["config"]["adapter"]
    scores = evaluated(folder, "out", capsys)
    name = "model" if method == "full" else "adapter"
    assert scores[name]["loss"] == pytest.approx(record["metrics"]["loss"], rel=1e-6)
    alone = evaluated(
        folder, "base", capsys, data="eval.jsonl", config_path=folder / "config.yaml", overrides=SETTINGS
    )["model"]
    assert scores["base"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert scores["base"]["loss"] > scores[name]["loss"]
    checkpoint = sorted((folder / "out/checkpoints").iterdir())[-1]
    assert evaluated(folder, f"out/checkpoints/{checkpoint.name}", capsys)["base"] == scores["base"]
    assert f"{record['trainable_parameters']:,}" in (folder / "out/README.md").read_text()


def test_stopped_again_and_again_it_ends_in_the_same_bits(ran, monkeypatch):
    _, folder = ran
    stops = until_done(partial(run, folder, "output=again"), monkeypatch, 37)
    again, out = folder / "again", folder / "out"
    assert stops >= 1 and log(again) == log(out)
    assert weights(again).read_bytes() == weights(out).read_bytes()
    last = "checkpoints/step-12/state.safetensors"
    assert (again / last).read_bytes() == (out / last).read_bytes()
    shutil.rmtree(again)


def test_another_base_is_refused(ran):
    _, folder = ran
    other = write_base(folder / "other", "gpt2", seed=1)
    with pytest.raises(ModelError, match="fingerprint"):
        evaluate_command([folder / "out"], base=str(other), data=str(folder / "eval.jsonl"))


def test_a_changed_file_is_refused(ran):
    _, folder = ran
    shutil.copytree(folder / "out", folder / "changed")
    data = bytearray(weights(folder / "changed").read_bytes())
    data[-1] ^= 1
    weights(folder / "changed").write_bytes(data)
    with pytest.raises(ModelError, match="changed since its manifest"):
        evaluate_command([folder / "changed"], base=str(folder / "base"), data=str(folder / "eval.jsonl"))


def test_init_from_begins_where_it_ended_and_refuses_another_method(ran, monkeypatch):
    method, folder = ran
    if method == "full":
        return  # model.name does it
    run(folder, "output=further", "adapter.init_from=out", "train.max_steps=1")
    record = json.loads((folder / "out/lora_ft.json").read_text())
    further = json.loads((folder / "further/lora_ft.json").read_text())
    assert further["metrics"]["loss"] < 1.2 * record["metrics"]["loss"]
    with pytest.raises(ModelError, match=f"method {method}, this run's is lora"):
        changes = ["adapter.init_from=out", "output=no"]
        (folder / "lora.yaml").write_text(CONFIG)
        monkeypatch.chdir(folder)
        train(load_config("lora.yaml", changes))


def test_merge_refuses_and_says_why(ran):
    method, folder = ran
    words = {"full": "complete model already", "bottleneck": "nonlinear", "prompt": "no weights"}
    with pytest.raises(ModelError, match=words[method]):
        merge_command(folder / "out")
    assert not (folder / "out-merged").exists()


def test_a_run_over_another_methods_leaves_nothing_of_it(ran, monkeypatch):
    method, folder = ran
    shutil.copytree(folder / "out", folder / "over")
    (folder / "lora.yaml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    train(load_config("lora.yaml", ["output=over", "train.max_steps=1"]), overwrite=True)
    kept = {p.name for p in (folder / "over").iterdir()}
    assert kept == RUN_FILES


def test_check_counts_what_will_train(ran, capsys, monkeypatch):
    _, folder = ran
    monkeypatch.chdir(folder)
    check(load_config("config.yaml", ["output=another"]), as_json=True)
    record = json.loads((folder / "out/lora_ft.json").read_text())
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == record["trainable_parameters"]


def test_experts_are_trained_resumed_merged_and_refused_where_they_have_no_place(tmp_path, monkeypatch, capsys):
    config = CONFIG.replace("{rank: 4, alpha: 8}", "{rank: 2, targets: [q, mlp], dropout: 0.1}")
    write_run(tmp_path, "mixtral", config.replace("num_train_epochs: 2", "max_steps: 4, save_steps: 2, eval_steps: 2"))
    monkeypatch.chdir(tmp_path)
    train(load_config("config.yaml", ["output=whole"]))
    train(load_config("config.yaml", ["output=out"]), until=2)
    train(load_config("config.yaml", ["output=out"]), resume=True)
    name = "adapter_model.safetensors"
    assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    merge_command(Path("out"))
    losses = []
    for folder, what in (("out", "adapter"), ("out-merged", "model")):
        capsys.readouterr()
        evaluate_command([Path(folder)], as_json=True, again=True)
        losses.append(json.loads(capsys.readouterr().out)[what]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    export_command(Path("out"), "peft", output=Path("x"))
    assert "vLLM" not in capsys.readouterr().out
    inspect_command([Path("out"), Path("x")], base="base")
    shown = capsys.readouterr().out
    assert shown.count("no problem found") == 2 and "\ngate_up " in shown and re.search(r"\nall +14 +1\.000 ", shown)
    configs = {name: load_config("config.yaml", [f"output={name}"]) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="runs that adapt experts can't be trained together"):
        train_together(configs)
    train(configs["a"])  # they have let go of their outputs
    with pytest.raises(ConfigError, match="adapter.dora: .* no DoRA on experts"):
        train(load_config("config.yaml", ["adapter.dora=true", "output=c"]))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("{method: full, rank: 4}", r"config.yaml:3: adapter.rank: applies to method lora, but adapter.method is full"),
        ("{method: bottleneck, alpha: 4}", r":3: adapter.alpha: applies to method lora"),
        ("{virtual_tokens: 4}", r":3: adapter.virtual_tokens: applies to method prompt, but adapter.method is lora"),
        ("{method: prompt, layers: [1]}", r":3: adapter.layers: applies to method lora and bottleneck"),
        ("{method: ful}", r":3: adapter.method: .*did you mean full"),
    ],
)
def test_a_setting_of_another_method_is_named_with_its_line(tmp_path, adapter, words):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("{rank: 4, alpha: 8}", adapter))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "config.yaml")


def test_full_in_a_lower_precision_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("{rank: 4, alpha: 8}", "{method: full}"))
    with pytest.raises(UserError, match=r"model.dtype: full trains float32 weights; .*trainer.bf16"):
        load_config(tmp_path / "config.yaml", ["model.dtype=bfloat16"])


@pytest.mark.parametrize(
    "change, words",
    [
        ("adapter.method=full", "model.quantization: full trains the base's weights"),
        ("trainer.fsdp=true", "trainer.fsdp: a quantized base is not shared out"),
    ],
)
def test_what_a_quantized_base_excludes_is_refused(tmp_path, change, words):
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match=words):
        load_config(tmp_path / "config.yaml", ["model.quantization=nf4", change])


def test_two_processes_train_every_weight_as_one_does(tmp_path):
    write_run(tmp_path, config=CONFIG.replace("rank: 4, alpha: 8", "method: full").replace("3.0e-2", "1.0e-3"))
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # of the runs in this process, which the forks would inherit
    for count in (1, 2):
        ranks.train(tmp_path, count, f"output=by{count}", *SETTINGS)
    one, two = (log(tmp_path / f"by{count}") for count in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "eval_loss", "grad_norm"):
        a, b = ([line[name] for line in lines if name in line] for lines in (one, two))
        assert a == pytest.approx(b, rel=1e-3) and a


def test_generate_answers_as_eval_does_alone_and_beside_its_base(ran, capsys, monkeypatch):
    """One batch of the trained and its base gives each the texts that `eval` generates; so do the prompt and the chat."""
    method, folder = ran
    monkeypatch.chdir(folder)
    wanted = {}
    for what, where in [("base", "base"), ("out", "adapter")]:
        more = {} if what == "out" else {"data": "eval.jsonl", "config_path": Path("config.yaml")}
        scoring = [*SETTINGS, "generation.metrics=[exact_match]", "generation.max_new_tokens=12"]
        evaluate_command([Path(what)], overrides=scoring, texts_path=Path(f"{what}.texts"), as_json=True, **more)
        name = where if what == "out" and method != "full" else "model"
        lines = [json.loads(line) for line in Path(f"{what}.texts").read_text().splitlines()]
        wanted[what] = {line["prompt"]: line[name] for line in lines}
    assert wanted["out"].keys() == wanted["base"].keys() and wanted["out"] != wanted["base"]
    texts = [row["text"] for row in map(json.loads, (folder / "eval.jsonl").read_text().splitlines())][:4]
    names = ["out"] if method == "full" else ["out", "base"]
    asked = [{"text": text, "adapter": name} for text in [*texts, "sad"] for name in names]
    if method == "full":
        asked = [{"text": row["text"]} for row in asked]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    greedy: dict = dict(greedy=True, max_new_tokens=12)
    capsys.readouterr()
    generate_command([Path("out")], prompts="asked.jsonl", as_json=True, batch_size=3, **greedy)
    found = [json.loads(line)["answer"].strip() for line in capsys.readouterr().out.splitlines()]
    prompts = [f"Review: {text}\nSentiment:" for text in texts]
    assert found[: -len(names)] == [wanted[name][prompt] for prompt in prompts for name in names]
    generate_command([Path("out")], prompt="sad", **greedy)
    assert capsys.readouterr().out.strip() == escape(found[-len(names)])
    monkeypatch.setattr("sys.stdin", io.StringIO("/both\nsad\n/base\nsad\n"))
    generate_command([Path("out")], **greedy)
    if method != "full":
        assert f"base: {escape(found[-1])}\nout: {escape(found[-2])}\n" in capsys.readouterr().out


def test_only_lora_adapters_share_a_base(ran, monkeypatch):
    method, folder = ran
    monkeypatch.chdir(folder)
    refused = (ConfigError, "Give it alone") if method == "full" else (ModelError, f"of method {method}; only LoRA")
    with pytest.raises(refused[0], match=refused[1]):
        generate_command([], adapters=["a=out", "b=out"], prompt="good")
