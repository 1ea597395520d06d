"""LoRA into a model and out of it, on every family: identity, freedom of the base, merge, seeds, names, errors."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods.lora.inject import inject_lora, lora_layers, merge, trainable, unmerge
from lora_ft.methods.lora.roles import architecture_of
from lora_ft.methods.lora.targets import find_targets
from lora_ft.nn.adapted import bare
from lora_ft.nn.lora import ALL_ROWS, LoRALinear, RowBlocks
from tests.helpers.families import FAMILIES, build, tiny_model, token_ids

EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "phimoe"}
IDS = token_ids()


def everything(family: str) -> list[str]:
    return ["attention"] if family in EXPERTS else ["all"]


def randomize(model: nn.Module, std: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in trainable(model).items():
        if ".lora_B." in name:
            parameter.data.normal_(std=std, generator=generator)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the base under its own names."""
    return {name.replace(".base.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_life_of_an_adapter(family):
    base = build(family)
    plain = logits(base)
    model = tiny_model(family)
    paths = inject_lora(model, everything(family), 4, 8.0, seed=0)
    assert paths == list(lora_layers(model)) and not any(layer.training for layer in lora_layers(model).values())
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=2e-6)  # B is zero

    randomize(model)
    moved = logits(model)
    assert (moved - plain).abs().max() > 1e-3
    with bare(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), moved)

    # a training step: gradients and movement in the adapter alone
    model(IDS, use_cache=False).logits.square().mean().backward()
    parameters = trainable(model)
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert got == set(parameters)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(parameters)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert_same_bits(base_state(model), dict(base.state_dict()))

    trained, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    layers = merge(model)
    assert list(layers) == paths and not lora_layers(model)
    for path in paths:
        kind = Conv1D if isinstance(base.get_submodule(path), Conv1D) else nn.Linear
        assert type(model.get_submodule(path)) is kind
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="merged already"):
        merge(model)

    unmerge(model, layers)
    assert_same_bits(dict(model.state_dict()), state)
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_read_one_tensor_draw_one_mask(family, monkeypatch):
    model = tiny_model(family)
    inject_lora(model, everything(family), 2, dropout=0.25)
    known = architecture_of(model.config)
    adapted = [r for r in known.projections if r in "qkvo" or family not in EXPERTS]
    modules = {r: known.projections[r].module for r in adapted}
    drawn = []
    rand_like = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda x, **kw: (drawn.append(x.shape), rand_like(x, **kw))[1])
    for layer in lora_layers(model).values():
        layer.train()
    model(IDS, use_cache=False)
    groups = len({"q", "o", "up", "down"} & set(modules))  # q k v draw together, gate and up too
    assert len(drawn) == groups * model.config.get_text_config().num_hidden_layers
    assert all(layer.dropout._mask is None for layer in lora_layers(model).values())  # and nothing is held


def test_logits_and_gradients_equal_pefts():
    ours = tiny_model("llama")
    inject_lora(ours, ["q", "v"], 4, 8.0, seed=0)
    randomize(ours)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model("llama"), config).eval()
    pairs = []
    for path, layer in lora_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        (part,) = layer.rows
        for mine, its in ((layer.lora_A[part], other.lora_A), (layer.lora_B[part], other.lora_B)):
            its["default"].weight.data.copy_(mine)
            pairs.append((mine, its["default"].weight))
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    for mine, its in pairs:
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_seed_alone_decides_A(family):
    def started(seed, noise):
        torch.manual_seed(noise)
        model = tiny_model(family)
        inject_lora(model, ["q", "v"], 4, seed=seed)
        return {name: p.detach() for name, p in trainable(model).items()}

    first = started(0, 1)
    assert_same_bits(started(0, 2), first)
    for name, A in first.items():
        if ".lora_A." in name:
            assert not torch.equal(A, started(1, 1)[name])
    As = [A for name, A in first.items() if ".lora_A." in name]
    assert not any(torch.equal(As[0], A) for A in As[1:])  # each module its own draw


def test_the_seed_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    inject_lora(tiny_model("gpt2"), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_merging_leaves_the_global_generator_alone():
    model = tiny_model("gpt2")
    inject_lora(model, seed=3)
    before = torch.get_rng_state()
    merge(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora):
    model = tiny_model("llama")
    inject_lora(model, rank=4, alpha=6.0, rslora=rslora)
    assert {layer.scaling for layer in lora_layers(model).values()} == {3.0 if rslora else 1.5}


def test_layers():
    model = tiny_model("llama")
    assert inject_lora(model, ["o"], 2, layers=[1], modules=["down_proj", "lm_head"]) == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]


def test_modules_by_exact_and_suffix_name_in_model_order():
    found = find_targets(build("gpt2"), ["v"], ["transformer.h.1.mlp.c_fc", "attn.c_proj"])
    assert list(found) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_fc",
    ]
    assert found["transformer.h.0.attn.c_attn"] == {"v": RowBlocks(1, 96, 64, 32)}
    assert found["transformer.h.0.attn.c_proj"] == {ALL_ROWS: RowBlocks(1, 32, 0, 32)}


def test_a_suffix_is_dotted():
    assert not [path for path in find_targets(build("llama"), [], ["lm_head", "up_proj"]) if "gate" in path]
    with pytest.raises(ModelError, match="'proj'"):
        find_targets(build("llama"), [], ["proj"])


def test_modules_alone_on_an_unknown_architecture():
    model = tiny_model("llama")
    model.config.model_type = "unheard_of"
    assert inject_lora(model, [], 2, modules=["q_proj"], layers=[0]) == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ModelError, match="'unheard_of'"):
        find_targets(build_unknown(), ["q"])


def build_unknown() -> nn.Module:
    model = tiny_model("llama")
    model.config.model_type = "unheard_of"
    return model


def test_a_module_that_a_role_reaches_too_is_adapted_once():
    found = find_targets(build("gpt2"), ["o"], ["c_proj"])
    assert [(path, *parts) for path, parts in found.items()][:2] == [
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", ALL_ROWS),
    ]


def test_a_fused_module_can_not_be_adapted_whole_and_in_parts():
    with pytest.raises(ModelError, match=r"h.0.attn.c_attn is adapted by `targets` already \(its q, v rows\)"):
        find_targets(build("gpt2"), ["v", "q"], ["c_attn"])


@pytest.mark.parametrize("family", ["gpt2", "smollm3", "gemma2", "gptj"])
def test_merging_an_adapted_head_leaves_the_embedding(family, tmp_path):
    model = tiny_model(family)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (family != "gptj")
    inject_lora(model, ["q"], 4, modules=["lm_head"], seed=0)
    randomize(model)
    expected = logits(model)
    layers = merge(model)
    assert torch.equal(model.get_input_embeddings().weight, build(family).get_input_embeddings().weight)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is False  # what vLLM and llama.cpp go by
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))

    unmerge(model, layers)
    assert torch.equal(logits(model), expected)
    assert model.config.tie_word_embeddings == build(family).config.tie_word_embeddings


def test_bare_ends_with_an_error_and_layers_that_were_off_stay_off():
    model = tiny_model("llama")
    inject_lora(model)
    first, *others = lora_layers(model).values()
    first.enabled = False
    with pytest.raises(RuntimeError), bare(model):
        raise RuntimeError
    assert not first.enabled and all(layer.enabled for layer in others)


def test_train_mode_follows_the_base():
    model = tiny_model("llama").train()
    inject_lora(model, dropout=0.1)
    assert all(layer.training for layer in lora_layers(model).values())
    model.eval()
    assert torch.equal(logits(model), logits(model))
    merge(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("family", "targets", "modules", "layers", "error", "says"),
    [
        ("llama", ["qq"], [], None, ConfigError, r"unknown role 'qq'; the nearest is 'q'.*`modules`"),
        ("llama", ["q_proj"], [], None, ConfigError, r"unknown role 'q_proj'.*`modules`"),
        ("gpt2", ["gate"], [], None, ModelError, r"gpt2 has no 'gate' projection. It has q \(attn.c_attn\)"),
        ("llama", [], ["q_prj"], None, ModelError, r"'q_prj' matches no module. Near: .*q_proj"),
        ("llama", [], ["q_prj", "lm_head"], None, ModelError, r"(?s)'q_prj'.*'lm_head' matched lm_head"),
        ("llama", [], ["q_prj", "o_prj"], None, ModelError, r"(?s)'q_prj'.*'o_prj'"),
        ("llama", [], ["xyz"], None, ModelError, r"Near: down_proj, gate_proj, k_proj, lm_head"),
        ("gpt2", [], ["wte"], None, ModelError, r"'wte' is Embedding \(transformer.wte\)"),
        ("llama", [], ["layers.1.mlp.up_proj"], [0], ModelError, r"only model.layers.1.mlp.up_proj, outside layers"),
        ("llama", ["q"], [], [1, 2], ModelError, r"layers \[2\]: this model has layers 0 to 1"),
        ("llama", ["q"], [], [-1], ModelError, r"layers \[-1\]"),
        ("llama", [], [], None, ModelError, r"nothing to adapt"),
    ],
)
def test_errors_say_what_where_and_what_to_do(family, targets, modules, layers, error, says):
    model = tiny_model(family)
    with pytest.raises(error) as raised:
        inject_lora(model, targets, modules=modules, layers=layers)
    assert re.search(says, str(raised.value)), str(raised.value)
    assert_same_bits(dict(model.state_dict()), dict(build(family).state_dict()))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())  # nothing was begun


def test_adapting_twice_is_refused():
    model = tiny_model("llama")
    inject_lora(model)
    with pytest.raises(ModelError, match="adapter layers already"):
        inject_lora(model, ["o"])


def test_a_quantized_module_is_refused():
    model = tiny_model("llama")
    packed = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.q_proj.weight = packed
    with pytest.raises(ModelError, match=r"q_proj is quantized \(torch.uint8\)"):
        find_targets(model, ["q"])


def test_subclasses_of_linear_are_adapted():
    model = tiny_model("falcon_new")  # FalconLinear
    inject_lora(model, ["o"])
    assert all(isinstance(layer, LoRALinear) for layer in lora_layers(model).values())
    assert type(next(iter(lora_layers(model).values())).base) is not nn.Linear


# ---- words: other ranks and alphas, and what is left out ----


@pytest.mark.parametrize(
    "family, settings, ranks",
    [
        ("llama", {"rank_pattern": {"q": 2}}, {"0.self_attn.q_proj": 2, "0.self_attn.v_proj": 4}),
        ("llama", {"rank_pattern": {"1": 2, "q": 3}}, {"0.self_attn.q_proj": 3, "1.self_attn.q_proj": 2}),
        ("llama", {"rank_pattern": {"0-1": 2}}, {"0.self_attn.q_proj": 2, "1.self_attn.v_proj": 2}),
        ("llama", {"rank_pattern": {"attention": 2}}, {"1.self_attn.v_proj": 2}),
        ("llama", {"rank_pattern": {"1.self_attn.q_proj": 2}}, {"0.self_attn.q_proj": 4, "1.self_attn.q_proj": 2}),
        ("gpt2", {"rank_pattern": {"c_attn": 2}}, {"0.attn.c_attn": 2}),
        ("gpt2", {"exclude": ["q"], "rank_pattern": {"v": 2}}, {"0.attn.c_attn": 2}),
    ],
)
def test_other_ranks(family, settings, ranks):
    model = tiny_model(family)
    inject_lora(model, ["q", "v"], rank=4, alpha=8, **settings)
    layers = {path.partition("layers." if family == "llama" else "h.")[2]: x for path, x in lora_layers(model).items()}
    assert {path: layers[path].rank for path in ranks} == ranks
    assert all(layers[path].scaling == 8 / rank for path, rank in ranks.items())


def test_another_alpha():
    model = tiny_model("llama")
    inject_lora(model, ["q", "v"], rank=4, alpha=8, alpha_pattern={"v": 1.0})
    assert {path[-6:]: layer.scaling for path, layer in lora_layers(model).items()} == {"q_proj": 2.0, "v_proj": 0.25}


def test_what_is_excluded():
    model = tiny_model("llama")
    adapted = inject_lora(model, ["all"], exclude=["mlp", "0", "1.self_attn.k_proj"])
    assert [path[-8:] for path in adapted] == ["n.q_proj", "n.v_proj", "n.o_proj"]
    fused = tiny_model("gpt2")
    inject_lora(fused, ["attention"], exclude=["k", "o"])
    assert {part for layer in lora_layers(fused).values() for part in layer.rows} == {"q", "v"}


@pytest.mark.parametrize(
    "family, settings, says",
    [
        ("llama", {"rank_pattern": {"o": 2}}, r"adapter.rank_pattern: 'o' stands for none .* q_proj, v_proj"),
        ("llama", {"alpha_pattern": {"2-9": 2.0}}, r"adapter.alpha_pattern: '2-9' stands for none"),
        ("llama", {"exclude": ["q_prj"]}, r"adapter.exclude: 'q_prj' stands for none"),
        ("llama", {"exclude": ["attention"]}, "nothing is left to adapt"),
        ("gpt2", {"rank_pattern": {"q": 2}}, r"h.0.attn.c_attn holds q and v in one module"),
    ],
)
def test_words_that_can_not_be_followed(family, settings, says):
    model = tiny_model(family)
    with pytest.raises(ModelError, match=says):
        inject_lora(model, ["q", "v"], **settings)
    assert not lora_layers(model)
