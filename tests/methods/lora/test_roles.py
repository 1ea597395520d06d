"""The role table, family by family: which rows a role moves, and what reaches the model's own attention and activation."""

import copy

import pytest
import torch
from transformers import AttentionInterface, GPT2Config, LlamaConfig, T5Config

from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.inject import inject_lora, lora_layers, merge, trainable
from lora_ft.methods.lora.roles import TABLE, architecture_of, fused
from lora_ft.methods.lora.targets import find_targets, unpack_targets
from lora_ft.nn.expert_names import PATH
from lora_ft.nn.lora import RowBlocks
from tests.helpers.families import FAMILIES, build, tiny_model, token_ids

RANK, ALPHA = 3, 6.0
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "phimoe"}

# Written out as each model's own attention code splits its fused output; tiny models have 4 heads of 8 (phi3: of 12).
THIRDS = ("gpt2", "mpt", "phi3_mha")
PER_HEAD = ("gpt_neox", "bloom", "persimmon", "falcon_per_head", "gpt_bigcode_mha")


def fused_rows(family: str, role: str, out_features: int) -> torch.Tensor:
    """The indices of a role's rows in the output of its module, in the order of the role's own B."""
    i = torch.arange(out_features)
    if role in ("gate", "up") and family in ("phi3", "phi3_mha", "glm", "glm4"):
        return dict(zip(("gate", "up"), i.chunk(2), strict=True))[role]
    if role not in ("q", "k", "v"):
        return i
    if family in THIRDS:
        q, k, v = i.split(32)
    elif family in PER_HEAD:
        q, k, v = i.view(4, 3, 8).unbind(1)
    elif family == "falcon_new":
        kv_heads = i.view(2, 4, 8)
        q, k, v = kv_heads[:, :2], kv_heads[:, 2], kv_heads[:, 3]
    elif family in ("falcon_multi_query", "gpt_bigcode"):
        heads = i.view(6, 8)
        q, k, v = heads[:4], heads[4], heads[5]
    elif family == "phi3":
        q, k, v = i.split((48, 24, 24))
    elif family == "codegen":
        q, v, k = i.view(4, 24).split(8, dim=-1)
    else:
        return i
    return {"q": q, "k": k, "v": v}[role].flatten()


def roles_of(family: str) -> list[str]:
    roles = list(architecture_of(build(family).config).projections)
    return [role for role in roles if role in "qkvo" or family not in EXPERTS]


def adapted(family: str, targets: list[str], layers: list[int] | None = None, seed: int = 0) -> torch.nn.Module:
    """A tiny model with random A and B on `targets`."""
    model = tiny_model(family)
    inject_lora(model, targets, RANK, ALPHA, layers=layers, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in trainable(model).items():
        if ".lora_B." in name:
            parameter.data.normal_(generator=generator)
    return model


def test_every_row_of_the_table_has_a_tiny_model():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_role_moves_its_own_rows_and_no_other(family):
    choices = [[role] for role in roles_of(family)] + [["q", "v"], ["attention" if family in EXPERTS else "all"]]
    for targets in choices:
        for layer in lora_layers(adapted(family, targets)).values():
            x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3))
            y, plain = layer(x), layer.base(x)
            expected, still = plain.clone(), torch.ones(layer.out_features, dtype=torch.bool)
            for role, A in layer.lora_A.items():
                rows = fused_rows(family, role, layer.out_features)
                expected[:, rows] += ALPHA / RANK * (x @ A.T) @ layer.lora_B[role].T
                still[rows] = False
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(y[:, still], plain[:, still], rtol=0, atol=2e-6)
            assert ((y - plain)[:, ~still].abs() > 1e-4).float().mean() > 0.98


SEEN: list[tuple[torch.Tensor, ...]] = []  # q, k, v of each attention call


def record(module, query, key, value, attention_mask, **kwargs):
    SEEN.append((query, key, value))
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register("record", record)
# These have attention code of their own: the method that splits into q, k and v, or the one that receives them
# (codegen's and gptj's until transformers 5.24, where they call the interface).
SPLITS = {"bloom": "_reshape", "falcon": "_split_heads"}
RECEIVES = {"codegen": "_attn", "gptj": "_attn", "gpt_neo": "_attn"}
PRODUCTS = {"mpt": "matmul", "xglm": "bmm"}  # no such method: q with k, then the weights with v


def look_inside(model: torch.nn.Module, monkeypatch) -> dict[str, torch.Tensor]:
    """In layer 0: the q, k, v that reach the attention, and what goes into o, into down, into the activation."""
    SEEN.clear()
    model_type, found = model.config.model_type, {}
    known = architecture_of(model.config)
    block = model.get_submodule(known.layers)[0]
    name = SPLITS.get(model_type) or RECEIVES.get(model_type)
    if module := next((m for m in block.modules() if name and hasattr(m, name)), None):
        method = getattr(module, name)

        def wrapped(*args):
            result = method(*args)
            SEEN.append(result if model_type in SPLITS else args[:3])
            return result

        setattr(module, name, wrapped)
    elif model_type in PRODUCTS:
        product, calls = getattr(torch, PRODUCTS[model_type]), []
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch, PRODUCTS[model_type], lambda a, b: (calls.append((a, b)), product(a, b))[1])
            model(token_ids())
        SEEN.append((calls[0][0], calls[0][1], calls[1][1]))
    else:
        model.set_attn_implementation("record")
    for role in {"o", "down"} & set(known.projections) if model_type not in EXPERTS else {"o"}:
        module = block.get_submodule(known.projections[role].module)
        module.register_forward_pre_hook(lambda m, args, role=role: found.setdefault(f"into {role}", args[0]))
    for path, module in block.named_modules():
        if path.rpartition(".")[2] in ("act_fn", "activation_fn") and model_type not in EXPERTS:
            module.register_forward_pre_hook(lambda m, args: found.setdefault("into activation", args[0]))
    with torch.no_grad():
        model(token_ids())
    return found | dict(zip("qkv", SEEN[0], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reaches_attention_and_activation(family, monkeypatch):
    base = look_inside(tiny_model(family), monkeypatch)
    for role in roles_of(family):
        got = look_inside(adapted(family, [role], layers=[0]), monkeypatch)
        moved = {
            part
            for part, value in got.items()
            if (value - base[part]).abs().max() > 2e-5 * (1 + base[part].abs().max())
        }
        if role in "qkv":  # of the three exactly this one, and all of it
            assert moved & set("qkv") == {role}, (role, moved)
            assert ((got[role] - base[role]).abs() > 1e-5).float().mean() > 0.97
            assert role != "q" or "into o" in moved
        else:  # what comes after the attention moves nothing before it
            assert not moved & {"q", "k", "v", "into o"}, (role, moved)
        if role in ("gate", "up"):
            assert "into down" in moved
        if role == "down":
            assert not moved
        if "gate" in roles_of(family) and role in ("gate", "up"):
            assert ("into activation" in moved) == (role == "gate"), (role, moved)


# What the tiny models have where their configs name it otherwise
KV_HEADS = {"falcon_new": 2, "falcon_multi_query": 1, "gpt_bigcode": 1, "gpt_bigcode_mha": 4}
WIDTH_128 = {"gpt2", "gptj", "gpt_bigcode", "gpt_bigcode_mha", "bloom", "codegen", "mpt"}


@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_parameters_by_formula(family):
    config = build(family).config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv = KV_HEADS.get(family) or getattr(config, "num_key_value_heads", None) or heads
    inner = 128 if family in WIDTH_128 or "falcon" in family else 40
    shapes = {  # role -> (in, out)
        "q": (hidden, heads * head_dim),
        "k": (hidden, kv * head_dim),
        "v": (hidden, kv * head_dim),
        "o": (heads * head_dim, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    everything = roles_of(family)
    for roles in [[role] for role in everything] + [["q", "v"], everything]:
        expected = config.num_hidden_layers * sum(RANK * (d_in + d_out) for d_in, d_out in map(shapes.get, roles))
        model = adapted(family, roles)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        assert sum(p.numel() for p in trainable(model).values()) == expected


def test_parts_follow_the_order_of_rows():
    for family, targets, ordered in (("codegen", ["k", "q", "v"], ["q", "v", "k"]), ("gpt2", ["v", "q"], ["q", "v"])):
        assert [list(parts) for parts in find_targets(build(family), targets).values()] == [ordered] * 2


def test_fused_blocks():
    assert fused(2, q=6, k=3) == {"q": RowBlocks(2, 9, 0, 6), "k": RowBlocks(2, 9, 6, 3)}


def test_rows_come_from_the_config():
    wide = architecture_of(GPT2Config(n_embd=48, n_head=6)).projections
    assert wide["v"].rows == RowBlocks(1, 144, 96, 48)
    assert architecture_of(LlamaConfig()).projections["v"].rows is None


def test_a_module_that_contradicts_the_config_is_an_error():
    model = copy.copy(tiny_model("gpt_neox"))
    model.config.hidden_size = 64
    with pytest.raises(ModelError, match=r"gpt_neox.layers.0.attention.query_key_value has 96 outputs.*4 x 48"):
        find_targets(model, ["q"])


def test_an_unknown_architecture_names_the_known_and_the_way_on():
    with pytest.raises(ModelError, match=r"(?s)'t5'.*`modules`.*gpt2.*llama"):
        architecture_of(T5Config())


def test_experts_are_adapted_all_or_none():
    with pytest.raises(
        ModelError, match=r"model.layers.0.mlp.experts.down_proj: some experts are adapted and some are not"
    ):
        inject_lora(copy.deepcopy(build("mixtral")), ["down"], exclude=["down_proj.1"])


def test_experts_are_not_merged_in_memory():
    model = copy.deepcopy(build("mixtral"))
    inject_lora(model, ["q", "down"])
    with pytest.raises(ModelError, match="Merge the adapter's folder: `lora-ft merge`"):
        merge(model)


@pytest.mark.parametrize("family", sorted(EXPERTS))
@pytest.mark.parametrize("group", ["mlp", "all", "up"])
def test_roles_of_the_mlp_are_those_of_all_experts(family, group):
    model = copy.deepcopy(build(family))
    with pytest.raises(ModelError, match="experts .* are 3-D parameters"):
        find_targets(model, [group])  # as bottleneck adapters, which have no place there
    unpack_targets(model, [group], [1])
    found = find_targets(model, [group], layers=[1])
    experts = [path for path in found if PATH.fullmatch(path)]
    assert len(experts) == (3 if group == "up" else 6) and all(path.startswith("model.layers.1.") for path in experts)
    gate_up = found[next(path for path in experts if ".gate_up_proj." in path)]
    assert set(gate_up) == ({"up"} if group == "up" else {"gate", "up"})
