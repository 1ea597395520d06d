"""Tiny random models of every family of the role table, for all tests."""

import copy
import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 100
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(num_key_value_heads=2)
MHA, MQA = dict(num_key_value_heads=4), dict(num_key_value_heads=1)
WIDE = dict(num_key_value_heads=2, head_dim=12)  # heads * head_dim (48) is not hidden_size
EXPERTS = dict(num_experts=3, num_local_experts=3, num_experts_per_tok=2, moe_intermediate_size=24)
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})

# family -> (model type, what differs from COMMON); kv-head variants and layouts are families of their own
FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", {}),
    "gpt_neo": ("gpt_neo", dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=8)),
    "gptj": ("gptj", dict(rotary_dim=4)),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", dict(multi_query=True)),
    "gpt_bigcode_mha": ("gpt_bigcode", dict(multi_query=False)),
    "bloom": ("bloom", {}),
    "opt": ("opt", dict(ffn_dim=40, word_embed_proj_dim=32)),
    "falcon_new": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_multi_query": ("falcon", dict(multi_query=True, new_decoder_architecture=False)),
    "falcon_per_head": ("falcon", dict(multi_query=False, new_decoder_architecture=False, alibi=True, bias=True)),
    "llama": ("llama", WIDE),
    "llama_mha": ("llama", MHA | dict(attention_bias=True, mlp_bias=True)),
    "llama_mqa": ("llama", MQA),
    "mistral": ("mistral", GQA | dict(head_dim=8, sliding_window=None)),
    "mixtral": ("mixtral", GQA | EXPERTS),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", WIDE),
    "qwen2_moe": ("qwen2_moe", GQA | EXPERTS | dict(shared_expert_intermediate_size=24)),
    "qwen3_moe": ("qwen3_moe", WIDE | EXPERTS),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE),
    "gemma3_text": ("gemma3_text", WIDE),
    "gemma3": (
        "gemma3",
        dict(
            text_config=COMMON | WIDE,
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            ),
            mm_tokens_per_image=4,
            image_token_index=99,
        ),
    ),
    "phi": ("phi", GQA),
    "phi3": ("phi3", WIDE),
    "phi3_mha": ("phi3", MHA),
    "olmo": ("olmo", GQA),
    "olmo2": ("olmo2", GQA),
    "olmo3": ("olmo3", GQA),
    "olmoe": ("olmoe", GQA | EXPERTS),
    "starcoder2": ("starcoder2", GQA),
    "smollm3": ("smollm3", GQA),
    "granite": ("granite", GQA),
    "cohere": ("cohere", GQA),
    "cohere2": ("cohere2", GQA | dict(head_dim=8)),
    "stablelm": ("stablelm", GQA | dict(use_qkv_bias=True, qk_layernorm=True)),
    "nemotron": ("nemotron", GQA),
    "glm": ("glm", GQA | dict(head_dim=8)),
    "glm4": ("glm4", GQA | dict(head_dim=8)),
    "persimmon": ("persimmon", {}),
    "codegen": ("codegen", dict(rotary_dim=4)),
    "mpt": ("mpt", dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128)),
    "gpt_oss": ("gpt_oss", GQA | EXPERTS | ROPE | dict(head_dim=8)),
    "phimoe": ("phimoe", GQA | EXPERTS | ROPE),
    "helium": ("helium", GQA | dict(head_dim=8)),
    "ernie4_5": ("ernie4_5", WIDE | dict(use_bias=True)),
    "exaone4": ("exaone4", GQA | dict(sliding_window=8, sliding_window_pattern=2)),
    "seed_oss": ("seed_oss", WIDE),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", WIDE),
    "apertus": ("apertus", GQA | ROPE),
    "arcee": ("arcee", GQA),
    "cwm": ("cwm", WIDE | ROPE),
    "ministral": ("ministral", WIDE),
    "ministral3": (
        "ministral3",
        WIDE
        | dict(
            rope_parameters=ROPE["rope_parameters"]
            | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128}
        ),
    ),
    "vaultgemma": ("vaultgemma", WIDE),
    "internlm3": ("internlm3", WIDE),
    "jais2": ("jais2", GQA),
    "nanochat": ("nanochat", GQA),
    "xglm": ("xglm", dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=40)),
    "biogpt": ("biogpt", {}),
}
# families whose distances are those in a row, by ALiBi or a window of their own: a beginning can't be shared
CANNOT_SHARE = {"bloom", "mpt", "falcon_per_head", "gpt_neo"}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of `family` with 2 layers in fp32 and eval mode, yours to change."""
    return copy.deepcopy(build(family, seed))


@functools.cache
def build(family: str, seed: int = 0) -> PreTrainedModel:
    """The cached model: not to be changed."""
    model_type, settings = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(settings if "text_config" in settings else COMMON | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        shake(model)
    return model


@torch.no_grad()
def shake(model: PreTrainedModel) -> None:
    """Random weights of a trained model's size: initial biases are 0 and norms 1, and faults would hide in them."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() == 1:
            parameter.add_(noise, alpha=0.1)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def token_ids(rows: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length) without the special ones."""
    return torch.randint(3, VOCABULARY - 1, (rows, length), generator=torch.Generator().manual_seed(seed))
