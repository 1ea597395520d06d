"""The table of architectures: in which module, and in which rows of its output, each projection is.

A role (`q k v o gate up down`) names a projection, not a module: GPT-2's q is the first third of the output of `attn.c_attn`,
GPT-NeoX's q the first third of each head's rows of `query_key_value`.

To add an architecture:

1. Add a row to `TABLE` under its `config.model_type`. If a module computes several projections, the row's `fused` computes
   their rows from the config; `fused()` below describes most layouts in a line.
2. Add a tiny model to `FAMILIES` in tests/helpers/families.py, one for each layout, for the tests on all families. Those in
   tests/methods/lora/test_roles.py have tables for what a config does not show: fused layouts (`fused_rows`), the function
   that receives q, k and v in own attention code (`SPLITS`, `RECEIVES`, `PRODUCTS`), sizes (`KV_HEADS`, `WIDTH_128`).
"""

from collections.abc import Callable
from typing import NamedTuple

from transformers import PretrainedConfig

from lora_ft.core.errors import ModelError
from lora_ft.nn.lora import RowBlocks


class Projection(NamedTuple):
    """Where a role is: a module's path within a layer, and the rows of its output (None: all of them)."""

    module: str
    rows: RowBlocks | None


class Architecture(NamedTuple):
    """The roles of a model with a given config: its model_type, the path of its list of layers, role -> Projection."""

    name: str
    layers: str
    projections: dict[str, Projection]


class Family(NamedTuple):
    """A row of the table: the path of the list of layers, the modules in a layer, the rows of roles that share a module."""

    layers: str
    modules: dict[str, str]  # a role, or the roles of one module ("q k v") -> the module's path
    fused: Callable[[PretrainedConfig], dict[str, RowBlocks]] = lambda config: {}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The roles of a model with this config; ModelError if its architecture is not in the table."""
    family = TABLE.get(config.model_type)
    if family is None:
        raise ModelError(
            f"targets: the roles of architecture {config.model_type!r} are not known. Name the modules to adapt under "
            f"`modules` instead (with `targets: []`): that works for any model. Known are {', '.join(sorted(TABLE))}."
        )
    rows = family.fused(config.get_text_config())
    projections = {
        role: Projection(module, rows.get(role)) for roles, module in family.modules.items() for role in roles.split()
    }
    return Architecture(config.model_type, family.layers, projections)


def fused(blocks: int, **lengths: int) -> dict[str, RowBlocks]:
    """The rows of each part of an output of `blocks` equal blocks, in each of which the parts follow each other.

    lengths: part -> its number of rows in a block.
    """
    width, start, parts = sum(lengths.values()), 0, {}
    for part, length in lengths.items():
        parts[part] = RowBlocks(blocks, width, start, length)
        start += length
    return parts


def head_dim(config: PretrainedConfig) -> int:
    """The number of rows of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def thirds(config: PretrainedConfig) -> dict[str, RowBlocks]:
    """All of q, then all of k, then all of v."""
    d = config.hidden_size
    return fused(1, q=d, k=d, v=d)


def per_head(config: PretrainedConfig) -> dict[str, RowBlocks]:
    """q, k and v of the first head, then of the second, and so on."""
    d = config.hidden_size // config.num_attention_heads
    return fused(config.num_attention_heads, q=d, k=d, v=d)


def falcon(config: PretrainedConfig) -> dict[str, RowBlocks]:
    """Three layouts: by key-value head, multi-query (one k and one v), or by head. GPTBigCode has the last two."""
    heads, d = config.num_attention_heads, head_dim(config)
    if getattr(config, "new_decoder_architecture", False):  # each key-value head after its query heads
        return fused(config.num_kv_heads, q=heads // config.num_kv_heads * d, k=d, v=d)
    return fused(1, q=heads * d, k=d, v=d) if config.multi_query else per_head(config)


def codegen(config: PretrainedConfig) -> dict[str, RowBlocks]:
    """q, v, k (in this order) of a quarter of the heads, four times: the model was trained on four devices."""
    d = config.hidden_size // 4
    return fused(4, q=d, v=d, k=d)


def gate_up(config: PretrainedConfig) -> dict[str, RowBlocks]:
    """All of gate, then all of up."""
    return fused(1, gate=config.intermediate_size, up=config.intermediate_size)


def phi3(config: PretrainedConfig) -> dict[str, RowBlocks]:
    """All of q, k and v in one module, gate and up in another."""
    d = head_dim(config)
    kv = config.num_key_value_heads * d
    return fused(1, q=config.num_attention_heads * d, k=kv, v=kv) | gate_up(config)


def attention(path: str, o: str) -> dict[str, str]:
    """The modules of an attention with separate q_proj, k_proj and v_proj, and its output projection `o`."""
    return {"q": f"{path}.q_proj", "k": f"{path}.k_proj", "v": f"{path}.v_proj", "o": f"{path}.{o}"}


ATTENTION = attention("self_attn", "o_proj")
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
GATE_UP = {"gate up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
PLAIN_MLP = {"up": "mlp.up_proj", "down": "mlp.down_proj"}
FC12 = {"up": "fc1", "down": "fc2"}
OUT_PROJ = attention("self_attn", "out_proj")
C_FC = {"up": "mlp.c_fc", "down": "mlp.c_proj"}
MPT = {"q k v": "attn.Wqkv", "o": "attn.out_proj", "up": "ffn.up_proj", "down": "ffn.down_proj"}
FC_IN = {"up": "mlp.fc_in", "down": "mlp.fc_out"}
C_ATTN = {"q k v": "attn.c_attn", "o": "attn.c_proj"} | C_FC


def query_key_value(path: str) -> dict[str, str]:
    """The modules of the BLOOM, Falcon, GPT-NeoX and Persimmon families; `path` is that of the attention."""
    qkvo = {"q k v": f"{path}.query_key_value", "o": f"{path}.dense"}
    return qkvo | {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


# The families in the last line have experts: the row is right for dense layers, the others are found by targets.py.
LLAMA_LIKE = (
    "cohere cohere2 cwm ernie4_5 exaone4 gemma gemma2 gemma3_text granite helium hunyuan_v1_dense internlm3 llama "
    "ministral ministral3 mistral olmo olmo2 olmo3 qwen2 qwen3 seed_oss smollm3 stablelm vaultgemma "
    "gpt_oss mixtral olmoe phimoe qwen2_moe qwen3_moe"
)
TABLE: dict[str, Family] = {
    **dict.fromkeys(LLAMA_LIKE.split(), Family("model.layers", ATTENTION | MLP)),
    **dict.fromkeys(["apertus", "arcee", "jais2", "nemotron"], Family("model.layers", ATTENTION | PLAIN_MLP)),
    "gemma3": Family("model.language_model.layers", ATTENTION | MLP),  # with its vision tower
    "starcoder2": Family("model.layers", ATTENTION | C_FC),
    "nanochat": Family("model.layers", ATTENTION | {"up": "mlp.fc1", "down": "mlp.fc2"}),
    "phi": Family("model.layers", attention("self_attn", "dense") | {"up": "mlp.fc1", "down": "mlp.fc2"}),
    "opt": Family("model.decoder.layers", OUT_PROJ | FC12),
    "xglm": Family("model.layers", OUT_PROJ | FC12),
    "biogpt": Family("biogpt.layers", OUT_PROJ | FC12),
    "gpt_neo": Family("transformer.h", attention("attn.attention", "out_proj") | C_FC),
    "gptj": Family("transformer.h", attention("attn", "out_proj") | FC_IN),
    "gpt2": Family("transformer.h", C_ATTN, thirds),
    "gpt_bigcode": Family("transformer.h", C_ATTN, falcon),
    "gpt_neox": Family("gpt_neox.layers", query_key_value("attention"), per_head),
    "bloom": Family("transformer.h", query_key_value("self_attention"), per_head),
    "falcon": Family("transformer.h", query_key_value("self_attention"), falcon),
    "persimmon": Family("model.layers", query_key_value("self_attn"), per_head),
    "codegen": Family("transformer.h", {"q k v": "attn.qkv_proj", "o": "attn.out_proj"} | FC_IN, codegen),
    "mpt": Family("transformer.blocks", MPT, thirds),
    "phi3": Family("model.layers", {"q k v": "self_attn.qkv_proj", "o": "self_attn.o_proj"} | GATE_UP, phi3),
    "glm": Family("model.layers", ATTENTION | GATE_UP, gate_up),
    "glm4": Family("model.layers", ATTENTION | GATE_UP, gate_up),
}
