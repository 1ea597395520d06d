"""Adapter files against PEFT itself, both ways, and against damage of every kind."""

import json
import os
import shutil
import time
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.core.names import portable_name
from lora_ft.methods.lora import files, peft_config
from lora_ft.methods.lora.inject import inject_lora, lora_layers, trainable
from lora_ft.methods.lora.peft import AdapterFile, read_adapter
from lora_ft.methods.trained import Trained
from lora_ft.nn.dora import DoRALinear
from lora_ft.nn.expert_names import PATH, parameter_of
from tests.helpers.families import tiny_model, token_ids
from tests.helpers.tiny import save_with_record


def read(folder: Path) -> AdapterFile:
    return read_adapter(Trained.open(folder))


IDS = token_ids(rows=2, length=11)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapted(family, seed=3, **settings):
    """A tiny model with LoRA in place and B far from zero."""
    model = tiny_model(family)
    inject_lora(model, **({"rank": 3, "alpha": 7.0, "seed": seed} | settings))
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            B.data.normal_(std=0.3, generator=generator)
        for length in layer.magnitude.values() if isinstance(layer, DoRALinear) else ():
            length.data.mul_(1 + 0.3 * torch.randn(length.shape, generator=generator))
    return model


def saved(family, folder, record=True, **settings):
    model = adapted(family, **settings)
    folder.mkdir(parents=True)
    (save_with_record if record else files.save_adapter)(model, folder, "base")
    return model


def edit(folder, **changes):
    """Change adapter_config.json; the record goes, as its manifest would tell."""
    (folder / files.RECORD).unlink(missing_ok=True)
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    (folder / files.RECORD).unlink(missing_ok=True)
    tensors = load_file(folder / files.WEIGHTS)
    save_file(change(dict(tensors)) or tensors, folder / files.WEIGHTS, {"format": "pt"})


CASES = [
    ("gpt2", dict(targets=("q", "v"))),
    ("gpt2", dict(targets=("q", "v"), modules=("attn.c_proj",))),
    ("gpt2", dict(targets=("v",), modules=("lm_head",))),
    ("gpt2", dict(targets=("q", "o", "down"), layers=[1])),
    ("llama", dict(targets=("q", "v"))),
    ("llama", dict(targets=("all",), modules=("lm_head",), rslora=True)),
    ("gpt_neox", dict(targets=("q", "v"))),
    ("gpt_neox", dict(targets=("k", "o", "up"))),
    ("phi3", dict(targets=("v", "gate"))),
    ("codegen", dict(targets=("q", "k"))),
    ("llama", dict(targets=("all",), rank_pattern={"mlp": 2, "1": 7, "lm_head": 3}, modules=("lm_head",))),
    ("llama", dict(targets=("q", "v"), rank_pattern={"0": 1}, alpha_pattern={"v": 3.0}, rslora=True)),
    ("gpt2", dict(targets=("q", "v", "o"), rank_pattern={"c_attn": 2}, alpha_pattern={"o": 1.0})),
    ("gpt_neox", dict(targets=("q", "v", "o"), rank_pattern={"o": 5}, exclude=("0",))),
    ("mixtral", dict(targets=("all",), rank_pattern={"down": 2}, alpha_pattern={"q": 3.0})),
    ("qwen3_moe", dict(targets=("q", "down"))),
    ("olmoe", dict(targets=("up",), layers=[1], dropout=0.1)),
    ("gpt_oss", dict(targets=("mlp", "v"), rslora=True)),
    ("gpt2", dict(targets=("q", "v"), modules=("attn.c_proj", "lm_head"), dora=True)),
    ("llama", dict(targets=("all",), modules=("lm_head",), dora=True, rank_pattern={"mlp": 2})),
    ("gpt_neox", dict(targets=("v", "o", "up"), dora=True, rslora=True)),
]


@pytest.mark.parametrize("family, settings", CASES)
def test_peft_and_we_load_what_we_save(tmp_path, family, settings):
    model = saved(family, tmp_path / "a", **settings)
    expected = logits(model)
    base = logits(tiny_model(family))
    assert (expected - base).abs().max() > 0.01  # there is something to lose

    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "a").eval()
    assert torch.allclose(logits(theirs), expected, atol=5e-6)
    adapted_there = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    experts = {path for path in lora_layers(model) if PATH.fullmatch(path)}
    assert {n for n in adapted_there if ".experts" not in n} == lora_layers(model).keys() - experts
    assert {parameter_of(path) for path in experts} == set(theirs.targeted_parameter_names)

    again = tiny_model(family)
    files.load_adapter(again, tmp_path / "a", trainable=True)
    assert trainable(again).keys() == trainable(model).keys()
    assert all(torch.equal(a, b) for a, b in zip(trainable(again).values(), trainable(model).values(), strict=True))
    assert all(p.requires_grad for p in trainable(again).values())
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == sum(
        p.numel() for p in trainable(model).values()
    )
    assert torch.equal(logits(again), expected)

    (tmp_path / "a" / files.RECORD).unlink()  # an ordinary adapter of rank R
    plain = tiny_model(family)
    files.load_adapter(plain, tmp_path / "a")
    assert not any(p.requires_grad for p in plain.parameters())
    assert torch.allclose(logits(plain), expected, atol=2e-6)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("gpt2", dict(targets=("q", "v", "o"))),
        ("llama", dict(targets=("all",), rank_pattern={"mlp": 2}, alpha_pattern={"v": 3.0})),
    ],
)
def test_pissa_starts_as_the_base_and_is_saved_as_lora_of_it(tmp_path, family, settings):
    settings |= {"init": "pissa"}
    fresh = tiny_model(family)
    inject_lora(fresh, **settings)
    assert torch.allclose(logits(fresh), logits(tiny_model(family)), atol=1e-5)

    model = saved(family, tmp_path / "a", **settings)
    expected = logits(model)
    assert (expected - logits(fresh)).abs().max() > 0.01
    for theirs in (peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "a").eval(), tiny_model(family)):
        if not isinstance(theirs, peft.PeftModel):
            files.load_adapter(theirs, tmp_path / "a")
        assert torch.allclose(logits(theirs), expected, atol=1e-5)

    again = adapted(family, seed=9, **settings)
    files.initialize_from(again, read(tmp_path / "a"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert torch.equal(logits(again), expected)


THEIRS = [
    ("gpt2", dict(target_modules=["c_attn"])),
    ("gpt2", dict(target_modules=r".*\.1\.mlp\.c_(fc|proj)", use_rslora=True)),
    ("gpt2", dict(target_modules=["attn.c_proj", "lm_head"])),
    ("llama", dict(target_modules="all-linear")),
    ("llama", dict(target_modules=["q_proj", "mlp.down_proj"], layers_to_transform=[1])),
    ("llama", dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"])),
    (
        "llama",
        dict(
            target_modules=["q_proj", "k_proj", "down_proj"],
            rank_pattern={"k_proj": 2, "layers.1.mlp.down_proj": 7},
            alpha_pattern={r"layers\.0\..*q_proj": 1, "_proj": 9},
        ),
    ),
    ("gpt_neox", dict(target_modules=["query_key_value", "dense"])),
    ("llama_mha", dict(target_modules=["q_proj", "lm_head"])),
    ("mixtral", dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    (
        "qwen3_moe",
        dict(target_modules=[], target_parameters=["1.mlp.experts.down_proj"], rank_pattern={"down_proj": 3}),
    ),
    ("gpt_oss", dict(target_modules=["o_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
    ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], use_dora=True)),
    ("llama", dict(target_modules=["q_proj", "mlp.down_proj", "lm_head"], use_dora=True)),
    ("gpt_neox", dict(target_modules=["query_key_value"], use_dora=True)),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, settings", THEIRS)
def test_we_load_what_peft_saves(tmp_path, family, settings):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        tiny_model(family), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | settings)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(family)
    adapter = files.load_adapter(ours, tmp_path)
    assert adapter.trained.record == {} and adapter.parts == {}
    assert (logits(theirs) - logits(tiny_model(family))).abs().max() > 0.01
    assert torch.allclose(logits(ours), logits(theirs), atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_half_precision_adapter_is_read_exactly(tmp_path):
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    ours = tiny_model("llama")
    files.load_adapter(ours, tmp_path)
    stored = load_file(tmp_path / files.WEIGHTS)
    for name, layer in lora_layers(ours).items():
        assert torch.equal(layer.lora_A["all"], stored[f"base_model.model.{name}.lora_A.weight"].float())


def test_the_files_are_padded_to_one_rank_and_name_the_base_as_given(tmp_path):
    model = adapted("gpt2", targets=("q", "v"), modules=("attn.c_proj",))
    files.save_adapter(model, tmp_path, "/home/someone/models/base")
    config = json.loads((tmp_path / files.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (6, 14, True)
    assert config["target_modules"] == ["attn.c_proj", "c_attn"]  # c_proj alone would catch mlp.c_proj
    assert config["base_model_name_or_path"] == "/home/someone/models/base"  # where PEFT finds it
    tensors = load_file(tmp_path / files.WEIGHTS)
    assert len(tensors) == 8
    A = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
    B = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    layer = lora_layers(model)["transformer.h.0.attn.c_attn"]
    assert torch.equal(A, torch.cat([layer.lora_A["q"], layer.lora_A["v"]]))
    assert torch.equal(B[:32, :3], layer.lora_B["q"]) and torch.equal(B[64:, 3:], layer.lora_B["v"])
    assert not B[32:64].any() and not B[:32, 3:].any() and not B[64:, :3].any()
    padded = tensors["base_model.model.transformer.h.0.attn.c_proj.lora_A.weight"]
    assert padded.shape == (6, 32) and not padded[3:].any()


@pytest.mark.parametrize(
    "name, written",
    [("org/model", "org/model"), ("models/x", "models/x"), ("/a/b/", "b"), ("~/b", "b"), (r"C:\a\b", "b")],
)
def test_names_of_bases(name, written):
    assert portable_name(name) == written


def test_same_adapter_same_bytes_and_modes_of_the_umask(tmp_path):
    for name, mask in (("a", 0o022), ("b", 0o077)):
        before = os.umask(mask)
        saved("gpt2", tmp_path / name)
        os.umask(before)
    for name in (files.WEIGHTS, files.CONFIG, files.RECORD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).stat().st_mode & 0o777 == 0o644
        assert (tmp_path / "b" / name).stat().st_mode & 0o777 == 0o600


def test_scalings_that_differ_are_pefts_patterns(tmp_path):
    model = adapted("llama")
    list(lora_layers(model).values())[1].scaling *= 3
    expected = logits(model)
    tmp_path.joinpath("a").mkdir()
    save_with_record(model, tmp_path / "a", "base")
    again = tiny_model("llama")
    files.load_adapter(again, tmp_path / "a")
    assert torch.allclose(logits(again), expected, atol=2e-6)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a").eval()
    assert torch.allclose(logits(theirs), expected, atol=2e-6)


# ---- beginning from an adapter ----


@pytest.mark.parametrize("record", [True, False])
def test_init_from_ours(tmp_path, record):
    model = saved("gpt2", tmp_path / "a", record=record, modules=("attn.c_proj",))
    fresh = adapted("gpt2", seed=9, modules=("attn.c_proj",))
    files.initialize_from(fresh, read(tmp_path / "a"))
    assert all(torch.equal(a, b) for a, b in zip(trainable(fresh).values(), trainable(model).values(), strict=True))
    assert all(p.requires_grad for p in trainable(fresh).values())


def test_init_from_between_lora_and_dora(tmp_path):
    lora, dora = saved("gpt2", tmp_path / "lora"), saved("gpt2", tmp_path / "dora", dora=True)
    fresh = adapted("gpt2", seed=9, dora=True)
    files.initialize_from(fresh, read(tmp_path / "dora"))
    assert torch.equal(logits(fresh), logits(dora))
    files.initialize_from(fresh, read(tmp_path / "lora"))  # starts from what LoRA computes
    assert torch.allclose(logits(fresh), logits(lora), atol=1e-6)
    with pytest.raises(ModelError, match="trained with DoRA, and this run is not. Set adapter.dora: true"):
        files.initialize_from(adapted("gpt2"), read(tmp_path / "dora"))


@pytest.mark.filterwarnings("ignore")
def test_init_from_pefts_with_another_alpha(tmp_path):
    theirs = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = adapted("llama", targets=("q",), rank=4, alpha=16)
    files.initialize_from(ours, read(tmp_path))
    assert torch.allclose(logits(ours), logits(theirs), atol=2e-6)


@pytest.mark.parametrize(
    "settings, why",
    [
        (dict(rank=2), "rank 3, parts q, v; this run adapts it with rank 2"),
        (dict(targets=("q", "k")), "parts q, v; this run adapts it with rank 3, parts q, k"),
        (dict(modules=("attn.c_proj",)), r"missing: transformer.h.0.attn.c_proj.*unexpected: none"),
        (dict(targets=("o",)), r"missing: .*c_proj.*unexpected: transformer.h.0.attn.c_attn"),
    ],
)
def test_init_from_another_shape_of_run(tmp_path, settings, why):
    saved("gpt2", tmp_path / "a")
    with pytest.raises(ModelError, match=why):
        files.initialize_from(adapted("gpt2", **settings), read(tmp_path / "a"))


def test_init_from_a_foreign_adapter_that_moves_more(tmp_path):
    saved("gpt2", tmp_path / "a", record=False, targets=("q", "k"))
    whole = r"as one module, so must this run: adapter.targets: \[\], adapter.modules: \[c_attn\]"
    with pytest.raises(ModelError, match=r"c_attn.lora_B.weight holds more than rank 3 of the parts q, v. .*" + whole):
        files.initialize_from(adapted("gpt2", targets=("q", "v")), read(tmp_path / "a"))
    saved("gpt2", tmp_path / "b", record=False, targets=(), modules=("c_attn",))
    with pytest.raises(ModelError, match="has rank 3; this run adapts it with rank 3, parts q, v. .*" + whole):
        files.initialize_from(adapted("gpt2", targets=("q", "v")), read(tmp_path / "b"))
    files.initialize_from(adapted("gpt2", targets=(), modules=("c_attn",)), read(tmp_path / "b"))


# ---- damage ----


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "good"
    saved("gpt2", folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def refused(folder, *why):
    with pytest.raises(ModelError) as caught:
        files.load_adapter(tiny_model("gpt2"), folder)
    for part in why:
        assert part in str(caught.value)


def test_changed_since_the_manifest(folder):
    path = folder / files.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(folder, str(path), "changed since its manifest")
    path.write_bytes(content[:-40])
    refused(folder, str(path), "changed since its manifest")
    (folder / files.RECORD).unlink()
    refused(folder, str(path), "damaged or truncated")
    path.unlink()
    refused(folder, str(path), "missing")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_that_leads_out(folder, name):
    record = json.loads((folder / files.RECORD).read_text())
    record["files"][name] = {"size": 1, "sha256": ""}
    (folder / files.RECORD).write_text(json.dumps(record))
    refused(folder, name, "leads out")


def test_keys_missing_and_too_many(folder):
    key = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"

    def change(tensors):
        del tensors[key.format(0, "B")]
        tensors["stray.lora_A.weight"] = torch.zeros(1)
        return tensors

    edit_tensors(folder, change)
    refused(folder, files.WEIGHTS, "missing: " + key.format(0, "B"), "unexpected: stray.lora_A.weight")


def test_modules_missing_and_too_many(folder):
    key = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"

    def change(tensors):
        for x in "AB":
            tensors[key.format(7, x)] = tensors.pop(key.format(1, x))
        return tensors

    edit_tensors(folder, change)
    refused(folder, "missing: transformer.h.1.attn.c_attn;", "unexpected: transformer.h.7.attn.c_attn.")


def test_wrong_shape_is_refused_before_a_value_is_read(folder):
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors | {key: torch.full((95, 6), torch.nan)})
    refused(folder, key, "(95, 6)", "(96, 6)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(folder, value):
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"

    def change(tensors):
        tensors[key][2, 3] = value

    edit_tensors(folder, change)
    refused(folder, files.WEIGHTS, key, "NaN or inf")


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(r=5), ["says rank 5", "(6, 32)", "(96, 6)"]),
        (dict(r=10**12), ["says rank 1000000000000"]),
        (dict(r=True), ["r is True"]),
        (dict(r=0), ["r is 0"]),
        (dict(r="6"), ["r is '6'"]),
        (dict(rank_pattern={"c_attn": 4}), ["says rank 4"]),
        (dict(rank_pattern={"(": 4}), ["isn't a valid pattern"]),
        (dict(lora_alpha=float("nan")), ["lora_alpha is nan"]),
        (dict(lora_alpha=float("inf")), ["lora_alpha is inf"]),
        (dict(lora_alpha=10**400), ["lora_alpha is 1000"]),
        (dict(alpha_pattern={"c_attn": None}), ["alpha_pattern['c_attn'] is None"]),
        (dict(peft_type="IA3"), ["peft_type is 'IA3'"]),
        (dict(use_dora=True), ["missing: transformer.h.0.attn.c_attn.lora_magnitude_vector", "this is DoRA"]),
        (dict(use_dora=1), ["use_dora is 1"]),
        (dict(lora_bias=True), ["lora_bias"]),
        (dict(bias="all"), ["bias is 'all'"]),
        (dict(modules_to_save="lm_head"), ["modules_to_save"]),
        (dict(trainable_token_indices=["a"]), ["trainable_token_indices"]),
        (dict(target_parameters="x"), ["target_parameters must be a list"]),
        (dict(init_lora_weights="pissa_niter_4"), ["pissa_niter_4"]),
        (dict(task_type="SEQ_CLS"), ["SEQ_CLS"]),
        (dict(use_next_years_method=True), ["use_next_years_method"]),
        (dict(next_layers=["a"]), ["unknown setting next_layers: ['a']"]),
        (dict(next_config={"a": 1}), ["unknown setting next_config"]),
        (dict(target_modules=7), ["target_modules"]),
        (dict(target_modules="("), ["is invalid"]),
        (dict(layers_to_transform=["a"]), ["layers_to_transform"]),
    ],
)
def test_configs_that_can_not_be_applied(folder, changes, why):
    edit(folder, **changes)
    refused(folder, files.CONFIG, *why)


def test_settings_of_a_later_peft_are_told_unless_they_are_off(folder, capsys):
    edit(folder, use_next_years_method=False, next_config=None, next_size=16, next_name="x", next_table={})
    files.load_adapter(tiny_model("gpt2"), folder)
    assert "unknown here, perhaps of a later PEFT: next_name: 'x', next_size: 16." in capsys.readouterr().err


def test_settings_of_this_peft_are_known():
    assert peft.LoraConfig().to_dict().keys() <= peft_config.KNOWN


@pytest.mark.parametrize("content", ["[" * 100_000, " " * (16 * 2**20 + 1), '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_deep_and_huge_configs(folder, content):
    (folder / files.RECORD).unlink()
    (folder / files.CONFIG).write_text(content)
    refused(folder, files.CONFIG)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_never_opened(folder, name):
    (folder / files.RECORD).unlink()
    (folder / files.WEIGHTS).unlink()
    # a pickle that makes a folder when it is opened
    (folder / name).write_bytes(b"cos\nmkdir\n(V" + str(folder / "opened").encode() + b"\ntR.")
    refused(folder, name, "not opened")
    assert not (folder / "opened").exists()


@pytest.mark.parametrize(
    "key, why",
    [
        ("transformer.wte.lora_embedding_A", "embedding"),
        ("transformer.h.0.attn.c_attn.lora_magnitude_vector", "this is not DoRA"),
        ("transformer.h.0.attn.c_attn.lora_B.bias", "lora_bias"),
        ("lm_head.weight", "fully trained or resized"),
        ("transformer.wte.weight", "fully trained or resized"),
        ("transformer.extra.weight", "unexpected: transformer.extra.weight"),
    ],
)
def test_extra_tensors_are_refused_by_name(folder, key, why):
    edit_tensors(folder, lambda tensors: tensors | {f"base_model.model.{key}": torch.zeros(100, 32)})
    refused(folder, key, why)


def test_a_copy_of_the_bases_own_weight_is_accepted_in_any_precision(folder):
    weight = tiny_model("gpt2").get_input_embeddings().weight.detach()
    for copy in (weight.clone(), weight.bfloat16()):
        edit_tensors(folder, lambda t, c=copy: t | {"base_model.model.transformer.wte.weight": c})
        files.load_adapter(tiny_model("gpt2"), folder)


def test_records_that_contradict_the_files(folder):
    path = folder / files.RECORD
    good = json.loads(path.read_text())
    module = "transformer.h.0.attn.c_attn"
    for change, why in [
        ({"scaling": 1.0}, ["scaling 1.0"]),
        ({"rank": 4}, ["don't fit"]),
        ({"rank": 2}, ["holds more than rank 2"]),
        ({"parts": {"q": [1, 96, 0, 32], "v": [1, 96, 32, 32]}}, ["holds more than rank 3"]),
        ({"parts": {"q": [1, 97, 0, 32]}}, ["don't fit"]),
        ({"parts": {"q": [1, 96, 80, 32]}}, ["don't fit"]),
        ({"parts": [1]}, ["can't be read"]),
        ({"parts": {"q": [1, float("inf"), 0, 32]}}, ["can't be read"]),
    ]:
        record = json.loads(json.dumps(good))
        record["slices"][module] |= change
        path.write_text(json.dumps(record))
        refused(folder, module, *why)
    record = json.loads(json.dumps(good))
    del record["slices"][module]
    path.write_text(json.dumps(record))
    refused(folder, "unexpected: " + module)
    path.write_text(json.dumps(good | {"format": 2}))
    refused(folder, "format 2")


def test_folders_that_hold_no_adapter(tmp_path, good):
    refused(tmp_path / "none", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "nothing trained there")
    shutil.copytree(good, tmp_path / "run" / "checkpoints" / "step-4")
    refused(tmp_path / "run", "unfinished", str(tmp_path / "run" / "checkpoints" / "step-4"))
    storage.write_json(tmp_path / "empty" / files.RECORD, {"format": 1, "kind": "merged"})
    refused(tmp_path / "empty", "a merged model")


def test_a_model_takes_one_adapter(good):
    model = tiny_model("gpt2")
    files.load_adapter(model, good)
    with pytest.raises(ModelError, match="has an adapter already"):
        files.load_adapter(model, good)


@pytest.mark.parametrize("record", [{"base": "x"}, {"base": [1]}, {"config": [1]}, {"config": None}])
def test_a_record_of_other_types_is_an_error(record, tmp_path):
    saved("gpt2", tmp_path / "a", record=False)
    storage.write_json(tmp_path / "a" / files.RECORD, {"format": 1, "kind": "adapter"} | record)
    with pytest.raises(ModelError, match=f"lora_ft.json: damaged: {next(iter(record))} is not an object"):
        Trained.open(tmp_path / "a")


def test_an_exact_path_is_targeted_in_any_layer_as_in_peft():
    path, other = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    settings = dict(target_modules=[path, "up_proj"], layers_to_transform=[1])
    theirs = {name for name in (path, other) if check_target_module_exists(peft.LoraConfig(**settings), name)}
    assert peft_config.targeted(settings, [path, other], None) == theirs == {path, other}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"base": {"name": 5}}, "base.name is not a string"),
        ({"base": {"fingerprint": ["x"]}}, "base.fingerprint is not a string"),
        ({"tokenizer": {}}, "tokenizer is not a string"),
        ({"config": {"adapter": []}}, "config.adapter is not an object"),
        ({"step": "4"}, "step is not an integer"),
        ({"files": [1]}, "files is not an object"),
        ({"data": {"train": 1}}, "data.train is not an object"),
    ],
)
def test_an_entry_of_a_record_of_another_type_is_an_error(record, named, tmp_path):
    saved("gpt2", tmp_path / "a", record=False)
    storage.write_json(tmp_path / "a" / files.RECORD, {"format": 1, "kind": "adapter"} | record)
    with pytest.raises(ModelError, match=f"lora_ft.json: damaged: {named}"):
        Trained.open(tmp_path / "a")


@pytest.mark.parametrize(
    "setting", [{"base_model_name_or_path": ["x"]}, {"use_rslora": 1}, {"r": [4]}, {"target_modules": {"a": 1}}]
)
def test_a_setting_of_another_type_is_an_error(setting, folder):
    path = folder / peft_config.CONFIG
    (folder / files.RECORD).unlink()
    storage.write_json(path, json.loads(path.read_text()) | setting)
    with pytest.raises(ModelError, match=f"{peft_config.CONFIG}: .*{next(iter(setting))}|{next(iter(setting))} is"):
        files.read_adapter(Trained.open(folder))


ENDLESS = "(?:(?:.|.)+)+[A-Z]"  # for `regex` too, which ends many that `re` does not


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_without_end_is_refused(key, folder):
    path = folder / peft_config.CONFIG
    (folder / files.RECORD).unlink()
    value = {ENDLESS: 4} if key.endswith("pattern") else ENDLESS
    storage.write_json(path, json.loads(path.read_text()) | {key: value})
    started = time.monotonic()
    with pytest.raises(ModelError, match="takes more than"):
        files.load_adapter(tiny_model("gpt2"), folder)
    assert time.monotonic() - started < 15
