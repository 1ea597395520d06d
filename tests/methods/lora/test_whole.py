"""Modules trained in full beside A and B: against PEFT's modules_to_save both ways, merged, and refused by name."""

import json
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_ft.commands.export.command import export_command
from lora_ft.config.schema import AdapterConfig
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora import files, merge
from lora_ft.methods.lora.derived import open_part
from lora_ft.methods.lora.inject import merge as merge_in_place
from lora_ft.methods.lora.inject import trainable, unmerge
from lora_ft.methods.lora.method import inject
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.lora.whole import whole_modules
from lora_ft.methods.trained import Trained
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base
from lora_ft.nn import loss
from lora_ft.nn.adapted import bare
from tests.helpers.families import tiny_model, token_ids
from tests.helpers.tiny import save_with_record

IDS = token_ids(rows=2, length=11)

# (family, tied, train_modules, their paths)
CASES = [
    ("gpt2", True, ["lm_head", "ln_f"], ["transformer.ln_f", "lm_head"]),
    ("gpt2", True, ["wte", "wpe"], ["transformer.wte", "transformer.wpe"]),
    ("llama", False, ["lm_head", "embed_tokens"], ["model.embed_tokens", "lm_head"]),
    ("llama", True, ["lm_head", "embed_tokens"], ["model.embed_tokens", "lm_head"]),
    ("llama", True, ["embed_tokens", "model.norm"], ["model.embed_tokens", "model.norm"]),
    ("gpt_neox", False, ["lm_head", "final_layer_norm"], ["gpt_neox.final_layer_norm", "lm_head"]),
    ("gpt_neox", True, ["lm_head"], ["lm_head"]),
]


def model_of(family: str, tied: bool):
    model = tiny_model(family)
    if tied and not model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = True
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config).eval()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    return model


def adapt(model, names, **settings):
    inject(model, AdapterConfig(**{"targets": ["q", "v"], "rank": 2, "train_modules": names} | settings), 0, None)
    return model


@torch.no_grad()
def shaken(model, seed=3):
    """The same with what trains moved away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def saved(model, folder: Path, base=None) -> Path:
    folder.mkdir()
    about = {"name": base.name, "revision": None, "fingerprint": base.fingerprint} if base else {}
    save_with_record(model, folder, "base", base=about)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, tied, names, paths", CASES)
def test_peft_computes_what_we_save_and_we_what_it_saves(tmp_path, family, tied, names, paths):
    base = model_of(family, tied)
    weights, plain = {n: p.clone() for n, p in base.named_parameters()}, logits(base)
    model = adapt(base, names)
    assert list(whole_modules(model)) == paths and torch.equal(logits(model), plain)
    expected = logits(shaken(model))
    assert (expected - plain).abs().max() > 0.1
    with bare(model):
        assert torch.equal(logits(model), plain)
    assert all(any(torch.equal(w, p) for p in model.parameters()) for w in weights.values())

    folder = saved(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of(family, tied), folder).eval()
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    wrapped = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "modules_to_save")]
    assert wrapped == paths
    again = model_of(family, tied)
    files.load_adapter(again, folder, trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(trainable(again).values(), trainable(model).values(), strict=True))
    assert torch.equal(logits(again), expected)

    theirs.save_pretrained(tmp_path / "theirs")
    again = model_of(family, tied)
    files.load_adapter(again, tmp_path / "theirs")
    assert not trainable(again) and torch.allclose(logits(again), expected, atol=1e-5)


def test_the_names_in_the_config_are_of_these_modules_alone_by_pefts_rule(tmp_path):
    config = json.loads((saved(adapt(tiny_model("llama"), ["model.norm"]), tmp_path / "a") / files.CONFIG).read_text())
    assert config["modules_to_save"] == ["model.norm"]  # "norm" is the end of input_layernorm too
    many = saved(adapt(tiny_model("llama"), ["input_layernorm", "model.norm"]), tmp_path / "b")
    assert json.loads((many / files.CONFIG).read_text())["modules_to_save"] == ["input_layernorm", "model.norm"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", [256, 8])
@pytest.mark.parametrize("family, tied", [("gpt2", True), ("llama", False)])
def test_twenty_steps_have_pefts_losses(monkeypatch, family, tied, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)  # with 8 the gradient of the head is summed over chunks
    names = ["lm_head", "wte" if family == "gpt2" else "model.norm"]
    ours = adapt(model_of(family, tied), names, targets=[], modules=["c_attn" if family == "gpt2" else "q_proj"])
    target = ["c_attn" if family == "gpt2" else "q_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=target, modules_to_save=names)
    theirs = peft.get_peft_model(model_of(family, tied), config).eval()
    for path, layer in files.lora_layers(ours).items():
        A = theirs.base_model.model.get_submodule(path).lora_A["default"].weight
        A.data.copy_(layer.lora_A["all"].data)
    train_side_by_side(ours, theirs)


def train_side_by_side(ours, theirs, tokens: Sequence[int] = ()) -> None:
    """Twenty steps of both on the same rows, which have `tokens` in them, with equal losses."""
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    assert len(optimizers[0].param_groups[0]["params"]) == len(optimizers[1].param_groups[0]["params"])
    losses: tuple[list, list] = ([], [])
    for step in range(20):
        ids = token_ids(1, 24, seed=step)
        ids[0, 5 : 5 + 2 * len(tokens) : 2] = torch.tensor(tokens, dtype=torch.long)
        total = loss.supervised_loss(ours, ids, torch.arange(24)[None], torch.arange(23), ids[0, 1:]) / 23
        wanted = theirs(input_ids=ids, labels=ids).loss
        for value, optimizer, kept in zip((total, wanted), optimizers, losses, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            kept.append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_trains_float32(dtype):
    model = adapt(tiny_model("llama").to(dtype), ["lm_head", "norm", "embed_tokens"])
    plain = logits(model)
    with bare(model):
        assert torch.equal(logits(model), plain)
    model(input_ids=IDS).logits.float().sum().backward()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert all(p.grad is not None for p in trainable(model).values())


@pytest.mark.parametrize("family, tied, names, paths", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_models_compute_the_same_without_lora_ft(tmp_path, capsys, family, tied, names, paths, dtype):
    model = model_of(family, tied).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    base = resolve(str(tmp_path / "base"))
    adapter = saved(shaken(adapt(model, names)), tmp_path / "adapter", base)
    report = merge.merge_adapter(base, read_adapter(Trained.open(adapter)), tmp_path / "out")
    unties = tied and bool({"lm_head", "wte", "embed_tokens"} & set(names))
    assert report["whole"] == sorted(paths) and report["untied"] == unties
    assert ("no longer tied" in capsys.readouterr().err) == unties
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    for path, module in whole_modules(model).items():
        for name, parameter in module.trained.named_parameters():
            assert torch.equal(plain.get_submodule(path).get_parameter(name), parameter.to(dtype))
    head, embedding = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    if unties and "lm_head" not in names:
        assert torch.equal(head, model.get_output_embeddings().weight)  # which stays the base's
    if unties and "lm_head" in paths and len({*paths} & {"transformer.wte", "model.embed_tokens"}) == 0:
        assert torch.equal(embedding, model.get_input_embeddings().weight)
    expected = logits(model)
    layers = merge_in_place(model)
    assert torch.allclose(logits(plain), logits(model), atol=1e-5 if dtype == torch.float32 else 0.1)
    assert model.config.tie_word_embeddings == (tied and not unties)
    unmerge(model, layers)
    assert torch.equal(logits(model), expected) and model.config.tie_word_embeddings == tied


def test_a_head_with_lora_beside_its_trained_embedding(tmp_path):
    model = model_of("gpt2", tied=True)
    model.save_pretrained(tmp_path / "base")
    base = resolve(str(tmp_path / "base"))
    shaken(adapt(model, ["wte"], modules=["lm_head"]))
    merge.merge_adapter(base, read_adapter(Trained.open(saved(model, tmp_path / "a", base))), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(train_modules=["lmhead"]), ["'lmhead' matches no module", "Near: lm_head"]),
        (dict(train_modules=["mlp"]), ["transformer.h.0.mlp (GPT2MLP)", "Name heads, norms or embeddings"]),
        (dict(train_modules=["lm_head"], modules=["lm_head"]), ["lm_head is adapted by"]),
        (dict(train_modules=["h.0.attn.c_attn"]), ["transformer.h.0.attn.c_attn is adapted by"]),
    ],
)
def test_what_can_not_be_trained_in_full_is_named(settings, words):
    with pytest.raises(ModelError) as error:
        adapt(tiny_model("gpt2"), **{"names": settings.pop("train_modules")} | settings)
    assert all(word in str(error.value) for word in ["adapter.train_modules", *words]), error.value


def test_beside_a_quantized_base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = resolve(str(tmp_path / "base"))
    model = shaken(adapt(load_base(base, "float32", quantization="int8"), ["lm_head", "norm"]))
    with pytest.raises(ModelError, match="or is quantized"):
        adapt(load_base(base, "float32", quantization="int8"), ["q_proj"])
    adapter = read_adapter(Trained.open(saved(model, tmp_path / "a", base)))
    merge.merge_adapter(base, adapter, tmp_path / "out", form="int8")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)


def changed(folder: Path, tensors=lambda t: t, **config) -> Path:
    (folder / files.RECORD).unlink()
    save_file(tensors(load_file(folder / files.WEIGHTS)), folder / files.WEIGHTS)
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    "tensors, config, words",
    [
        (lambda t: {k: v for k, v in t.items() if k != HEAD}, {}, "missing: lm_head.weight"),
        (lambda t: t, dict(modules_to_save=None), "has a weight lm_head.weight that differs from the base's"),
        (lambda t: t, dict(modules_to_save="lm_head"), "modules_to_save must be a list of names"),
        (lambda t: t, dict(modules_to_save=["lm_head", "mlp"]), "h.0.mlp (GPT2MLP) holds other modules"),
        (lambda t: t, dict(modules_to_save=["lm_head", "ln_f"]), "missing: transformer.ln_f.bias"),
        (lambda t: t | {HEAD: t[HEAD][:99].clone()}, {}, "has shape (99, 32), the model needs (100, 32)"),
        (lambda t: t | {HEAD: t[HEAD] * torch.nan}, {}, f"{HEAD} contains NaN or inf"),
        (lambda t: t | {HEAD: t[HEAD].int()}, {}, f"{HEAD} is torch.int32"),
    ],
)
def test_files_that_can_not_be_applied_are_refused(tmp_path, tensors, config, words):
    folder = changed(saved(shaken(adapt(tiny_model("gpt2"), ["lm_head"])), tmp_path / "a"), tensors, **config)
    with pytest.raises(ModelError) as error:
        files.load_adapter(tiny_model("gpt2"), folder)
    assert words in str(error.value), error.value


def test_a_run_that_trains_other_modules_does_not_start_from_it(tmp_path):
    trained = Trained.open(saved(shaken(adapt(tiny_model("gpt2"), ["lm_head"])), tmp_path / "a"))
    for names in ([], ["lm_head", "ln_f"]):
        with pytest.raises(ModelError, match="Make adapter.train_modules the same"):
            files.initialize_from(adapt(tiny_model("gpt2"), names), read_adapter(trained))


def test_what_holds_a_and_b_alone_refuses_them(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    base = resolve(str(tmp_path / "base"))
    folder = saved(shaken(adapt(model, ["lm_head"])), tmp_path / "a", base)
    for options, words in ((dict(to="peft"), "Use --to merged."), (dict(to="gguf", merged=True), "then|and export")):
        with pytest.raises(ModelError, match="modules trained in full .lm_head") as error:
            export_command(folder, **options)
        assert any(word in str(error.value) for word in words.split("|"))
    with pytest.raises(ModelError, match="A and B alone are combined and compressed"):
        open_part(folder)
    with pytest.raises(ModelError, match="Load it alone, without a name, or merge it"):
        files.load_adapter(tiny_model("llama"), folder, "a")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [dict(dora=True), dict(init="pissa")])
def test_beside_dora_and_pissa(tmp_path, settings):
    model = model_of("llama", tied=True)
    model.save_pretrained(tmp_path / "base")
    base = resolve(str(tmp_path / "base"))
    shaken(adapt(model, ["lm_head"], **settings))
    folder = saved(model, tmp_path / "a", base)
    theirs = peft.PeftModel.from_pretrained(model_of("llama", tied=True), folder).eval()
    assert torch.allclose(logits(theirs), logits(model), atol=2e-5)
    merge.merge_adapter(base, read_adapter(Trained.open(folder)), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(plain), logits(model), atol=2e-5)
