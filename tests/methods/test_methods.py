"""Every method beside LoRA: its mathematics against plain padded training, its files, and its own refusals."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lora_ft.config.schema import AdapterConfig
from lora_ft.core.errors import ModelError
from lora_ft.core.storage import read_tensors, write_tensors
from lora_ft.data.examples import EncodingReport, Examples
from lora_ft.methods import bottleneck
from lora_ft.methods.interface import METHODS, bare, virtual_ids
from lora_ft.methods.lora.inject import trainable
from lora_ft.methods.trained import Trained
from lora_ft.nn.bottleneck import Bottleneck
from tests.helpers.families import FAMILIES, tiny_model, token_ids
from tests.helpers.tiny import tiny_tokenizer
from tests.training.test_trainer import RATE, STEPS, corpus, plain_padded_training, run

TOKENIZER = tiny_tokenizer()
N = 5  # virtual tokens
SETTINGS = {
    "full": AdapterConfig(method="full"),
    "bottleneck": AdapterConfig(method="bottleneck", bottleneck_size=6, nonlinearity="gelu"),
    "prompt": AdapterConfig(method="prompt", virtual_tokens=N),
}


def injected(method: str, family: str = "gpt2", dtype: torch.dtype = torch.float32, seed: int = 0):
    model = tiny_model(family).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    METHODS[method].inject(model, SETTINGS[method], seed, TOKENIZER)
    return model


def with_virtual_tokens(model, dataset):
    report = EncodingReport(rows=0, used=0, examples=0)
    return Examples(dataset, report, [], dataset).with_prefix(virtual_ids(model)).dataset


def trained(method: str, folder, family: str = "gpt2", dtype: torch.dtype = torch.float32, **arguments):
    """A model after a few steps of the tool's trainer, and the logged losses."""
    model = injected(method, family, dtype)
    lines = run(
        model,
        folder,
        dataset=with_virtual_tokens(model, corpus()),
        **{"max_steps": 10, "learning_rate": RATE} | arguments,
    )
    return model, [line["loss"] for line in lines]


def shaken(model):
    """`model` with other values in all that trains: what starts at zero would hide faults."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trainable(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


class Houlsby(nn.Module):
    """The adapter as the paper's figure 2 has it, on the output of a frozen layer; independent of lora_ft.nn."""

    def __init__(self, layer: nn.Module, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.layer = layer
        self.D, self.d, self.U, self.u = (nn.Parameter(w.clone()) for w in weights.values())

    def forward(self, x):
        y = self.layer(x)
        return torch.nn.functional.gelu(y @ self.D.T + self.d) @ self.U.T + self.u + y


def reference(method: str, ours) -> nn.Module:
    """The same method at the same start without any of this tool's layers."""
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if method == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if method == "prompt":
        peft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
        peft.prompt_encoder["default"].embedding.weight.data.copy_(ours.get_input_embeddings().prompt)
        return peft
    for i in range(2):
        for path in (f"transformer.h.{i}.attn.c_proj", f"transformer.h.{i}.mlp.c_proj"):
            adapter = ours.get_submodule(path)
            weights = {n: p.detach() for n, p in adapter.named_parameters() if not n.startswith("base.")}
            model.set_submodule(path, Houlsby(model.get_submodule(path), weights))
    return model


@pytest.mark.parametrize("method", SETTINGS)
def test_losses_equal_plain_padded_training(method, tmp_path):
    model = reference(method, injected(method))
    start, rate = copy.deepcopy(model), {"prompt": 0.1}.get(method, RATE)
    losses = trained(method, tmp_path, max_steps=STEPS, learning_rate=rate)[1]
    theirs = list(itertools.islice(plain_padded_training(model, rate), 12))
    assert losses[:12] == pytest.approx([loss for loss, _ in theirs], abs=2e-4)
    loss, batch = theirs[-1]
    untrained = start(**batch).loss
    assert abs(untrained - loss) > 1e-2, "nothing was learned, so nothing was compared"


@pytest.mark.parametrize("method", SETTINGS)
def test_only_what_the_method_says_trains(method, tmp_path):
    model = injected(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, tmp_path, dataset=with_virtual_tokens(model, corpus()), max_steps=3, warmup_steps=0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model).keys() and moved
    d, layers = 32, 2
    counts = {
        "full": sum(p.numel() for p in tiny_model("gpt2").parameters()),
        "bottleneck": 2 * layers * (6 * d + 6 + d * 6 + d),
        "prompt": N * d,
        "bias": sum(p.numel() for n, p in tiny_model("gpt2").named_parameters() if n.endswith(".bias")),
    }
    assert sum(p.numel() for p in trainable(model).values()) == counts[method]


@pytest.mark.parametrize("method", SETTINGS)
def test_cutting_otherwise_and_checkpointing_change_only_rounding(method, tmp_path):
    whole = trained(method, tmp_path, micro_batch_tokens=10_000)
    cut = trained(method, tmp_path, micro_batch_tokens=30)
    checkpointed = trained(method, tmp_path, activation_checkpointing=True)
    assert whole[1] == pytest.approx(cut[1], rel=1e-4) and whole[1] == pytest.approx(checkpointed[1], rel=1e-4)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_bfloat16_base_trains_float32_weights(method, tmp_path):
    model, losses = trained(method, tmp_path, dtype=torch.bfloat16)
    assert losses == pytest.approx(trained(method, tmp_path)[1], rel=0.02)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    rest = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert rest == (set() if method == "full" else {torch.bfloat16})


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def virtual(model, ids):
    prefix = getattr(model.get_input_embeddings(), "ids", [])
    return torch.cat([torch.tensor([prefix] * len(ids), dtype=torch.long).view(len(ids), -1), ids], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", SETTINGS)
def test_what_is_saved_comes_back_and_can_be_switched_off(method, dtype, tmp_path):
    model, ids = shaken(injected(method, dtype=dtype)).eval(), token_ids()
    names, _ = METHODS[method].save(model, tmp_path, "base", TOKENIZER)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == set(names)
    trained = Trained(tmp_path, "full", {}, {}) if method == "full" else Trained.open(tmp_path)  # full needs a record
    assert trained.method == method

    fresh = injected(method, dtype=dtype, seed=1)
    METHODS[method].load_into(fresh, trained)
    assert all(torch.equal(a, b) for a, b in zip(trainable(fresh).values(), trainable(model).values(), strict=True))

    ours = tiny_model("gpt2").to(dtype)
    before = logits(copy.deepcopy(ours).to(torch.float32 if method == "full" else dtype), ids)
    METHODS[method].load(ours, trained)
    assert torch.equal(logits(ours, virtual(ours, ids)), logits(model, virtual(model, ids)))
    with bare(ours):
        assert torch.equal(logits(ours, ids), before)
    assert torch.equal(logits(ours, virtual(ours, ids)), logits(model, virtual(model, ids)))
    assert (logits(ours, virtual(ours, ids))[:, -7:] - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_full_model_is_an_ordinary_folder(family, tmp_path):
    model = shaken(injected("full", family)).eval()
    METHODS["full"].save(model, tmp_path, "base", TOKENIZER)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.dtype is torch.float32
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_peft_reads_our_prompt_and_computes_the_same(family, tmp_path):
    model, ids = shaken(injected("prompt", family)).eval(), token_ids()
    METHODS["prompt"].save(model, tmp_path, "base", TOKENIZER)
    theirs = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.allclose(logits(theirs, ids), logits(model, virtual(model, ids)), atol=1e-5)


def test_we_read_pefts_prompt(tmp_path):
    theirs = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = tiny_model("llama"), token_ids()
    METHODS["prompt"].load(ours, Trained.open(tmp_path))
    assert torch.allclose(logits(theirs, ids), logits(ours, virtual(ours, ids)), atol=1e-5)


def test_a_prompt_starts_from_the_vocabulary_or_a_text():
    embedding = tiny_model("gpt2").get_input_embeddings().weight
    drawn = injected("prompt").get_input_embeddings().prompt
    assert all((embedding == row).all(-1).any() for row in drawn)
    assert not torch.equal(drawn, injected("prompt", seed=1).get_input_embeddings().prompt)
    model = tiny_model("gpt2")
    model.resize_token_embeddings(len(TOKENIZER))
    ids = TOKENIZER("the film", add_special_tokens=False)["input_ids"]
    METHODS["prompt"].inject(
        model, AdapterConfig(method="prompt", virtual_tokens=N, init_text="the film"), 0, TOKENIZER
    )
    wanted = model.get_input_embeddings().weight[[ids[i % len(ids)] for i in range(N)]]
    assert torch.equal(model.get_input_embeddings().prompt, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bottleneck_starts_as_its_base_and_moves_every_family(family):
    model, ids = tiny_model(family), token_ids()
    base = logits(model, ids)
    try:
        METHODS["bottleneck"].inject(model, SETTINGS["bottleneck"], 0, TOKENIZER)
    except ModelError as e:
        assert "experts" in str(e), "only experts, which are no linear layers, have no place for it"
        return
    assert torch.equal(logits(model, ids), base)
    assert len(bottleneck.bottlenecks(model)) == 4
    assert (logits(shaken(model), ids) - base).abs().max() > 1e-3


def test_pfeiffer_has_one_adapter_a_layer():
    model = tiny_model("llama")
    settings = AdapterConfig(method="bottleneck", placement="pfeiffer", layers=[1])
    assert METHODS["bottleneck"].inject(model, settings, 0, TOKENIZER) == "1 adapter layers"
    assert [type(m) for m in (model.model.layers[1].mlp.down_proj, model.model.layers[0].mlp.down_proj)] == [
        Bottleneck,
        nn.Linear,
    ]


@pytest.mark.parametrize("method", SETTINGS)
def test_another_models_folder_is_refused(method, tmp_path):
    METHODS[method].save(injected(method, "gpt2"), tmp_path, "base", TOKENIZER)
    if method == "prompt":
        write_tensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": torch.zeros(N, 16)})
    with pytest.raises(ModelError, match="other|another|shape|tensors"):
        trained = Trained(tmp_path, "full", {}, {}) if method == "full" else Trained.open(tmp_path)
        METHODS[method].load(tiny_model("gpt_neo"), trained)


@pytest.mark.parametrize("method", ["bottleneck", "prompt"])
def test_a_wrong_shape_is_refused_before_a_value_is_read(method, tmp_path):
    METHODS[method].save(injected(method), tmp_path, "base", TOKENIZER)
    tensors = read_tensors(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith(("down.weight", "embeddings")))
    wider = torch.full((len(tensors[name]), tensors[name].shape[1] + 1), torch.nan)
    write_tensors(tmp_path / "adapter_model.safetensors", {n: t.clone() for n, t in tensors.items()} | {name: wider})
    with pytest.raises(ModelError, match=f"{name} has shape"):
        METHODS[method].load(tiny_model("gpt2"), Trained.open(tmp_path))


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_float8_files_are_read_or_refused_for_nan(value, tmp_path):
    """torch cannot search float8 tensors for NaN, so they are converted first."""
    METHODS["prompt"].save(injected("prompt"), tmp_path, "base", TOKENIZER)
    vectors = torch.full((N, 32), value).to(torch.float8_e4m3fn)
    write_tensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": vectors})
    ours, expected = tiny_model("gpt2"), pytest.raises(ModelError, match="NaN") if value != value else nullcontext()
    with expected:
        METHODS["prompt"].load(ours, Trained.open(tmp_path))
        assert torch.equal(ours.get_input_embeddings().prompt, torch.ones(N, 32))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("no"), torch.OutOfMemoryError, "no"),
        (RuntimeError("can't allocate memory"), RuntimeError, "allocate"),
        (ValueError(), ModelError, "into this base: ValueError"),
    ],
)
def test_a_full_model_that_can_not_be_loaded(error, kind, words, tmp_path, monkeypatch):
    model = tiny_model("gpt2")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(type(model), "from_pretrained", fail)
    with pytest.raises(kind, match=words) as caught:
        METHODS["full"].load_into(model, Trained(tmp_path, "full", {}, {}))
    assert type(caught.value) is kind
