"""GGUF files: read back by gguf's reader and by transformers they are the same numbers and the same function."""

import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_ft.commands.export.command import export_command
from lora_ft.commands.export.gguf_vocabulary import LLAMA3, QWEN2, TEKKEN
from lora_ft.core.errors import ConfigError, FilesError, ModelError
from lora_ft.methods.lora.files import load_adapter
from lora_ft.methods.lora.inject import inject_lora, lora_layers
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained
from lora_ft.model.files import resolve
from tests.helpers.families import COMMON, shake
from tests.helpers.tiny import TEXT, save_with_record, tiny_tokenizer, write_base

HEADS, KV_HEADS, HEAD = 4, 2, 12  # heads * head is not the hidden size
SHAPE = dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD)
FAMILIES = {
    "llama": SHAPE,
    "mistral": SHAPE | dict(sliding_window=None),
    "qwen2": dict(num_key_value_heads=KV_HEADS, num_attention_heads=HEADS),
    "qwen3": dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=128
    ),  # the one that transformers assumes of a GGUF
}
LLAMA_CPP = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NAMES = {
    **{"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}


def write_model(folder, family, tokenizer=None, **settings):
    tokenizer = tokenizer or tiny_tokenizer()
    about = COMMON | FAMILIES[family] | {"vocab_size": len(tokenizer) + 3} | settings
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **about)).eval()
    shake(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_adapter(folder, base, **settings):
    """A random adapter of `base` in `folder`, and the model with it."""
    files = resolve(str(base))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    inject_lora(model, **({"targets": ["all"], "rank": 3, "alpha": 7.0, "seed": 0} | settings))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            B.data.normal_(std=0.3, generator=generator)
    folder.mkdir()
    about = {"name": str(base), "revision": None, "fingerprint": files.fingerprint}
    save_with_record(model, folder, str(base), base=about)
    return model


def case(tmp_path, family, **settings):
    write_model(tmp_path / "base", family, **settings)
    return write_adapter(tmp_path / "out", tmp_path / "base")


def logits(model):
    ids = torch.arange(3, 90).reshape(3, 29)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def tensors(path):
    reader = gguf.GGUFReader(path)
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
        for t in reader.tensors
    }


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def as_transformers(rows, heads):
    """Rows of q or k from llama.cpp's order, pair by pair, to transformers' (first halves, then second), written out."""
    size = rows.shape[0] // heads
    order = [h * size + pair * 2 + half for h in range(heads) for half in (0, 1) for pair in range(size // 2)]
    return rows[order]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_what_llama_cpp_adds(tmp_path, family):
    """llama.cpp computes W x + alpha / rank B A x with the rank that it sees in B."""
    model = case(tmp_path, family)
    export_command(tmp_path / "out", "gguf")
    path = tmp_path / "out-lora.gguf"
    about, found = fields(path), tensors(path)
    assert about["general.type"] == "adapter" and about["adapter.type"] == "lora"
    assert about["general.architecture"] == LLAMA_CPP[family]
    layers = lora_layers(model)
    assert len(found) == 2 * len(layers) == 28
    for module, layer in layers.items():
        block, name = module.split(".")[2], module.rpartition(".")[2].removesuffix("_proj")
        key = f"blk.{block}.{NAMES[name]}.weight"
        A, B = found[f"{key}.lora_a"], found[f"{key}.lora_b"]
        change = about["adapter.lora.alpha"] / B.shape[1] * B @ A
        if name in "qk" and LLAMA_CPP[family] == "llama":
            change = as_transformers(change, HEADS if name == "q" else KV_HEADS)
        np.testing.assert_allclose(change, layer.delta().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_read_by_transformers_computes_the_same(tmp_path, capsys, family, tied):
    model = case(tmp_path, family, tie_word_embeddings=tied)
    export_command(tmp_path / "out", "gguf", merged=True)
    assert "read back by transformers" in capsys.readouterr().out
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out-merged.gguf").eval()
    assert torch.allclose(logits(read), logits(model), atol=2e-5)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (logits(read) - logits(bare)).abs().max() > 1e-2
    assert ("output.weight" in tensors(tmp_path / "out-merged.gguf")) == (not tied)


def test_a_merged_folder_becomes_a_gguf(tmp_path):
    model = case(tmp_path, "llama")
    export_command(tmp_path / "out", "merged")
    export_command(tmp_path / "out-merged", "gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out-merged.gguf").eval()
    assert torch.allclose(logits(read), logits(model), atol=2e-5)


def test_an_adapted_tied_head_is_a_tensor_of_its_own(tmp_path):
    write_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    model = write_adapter(tmp_path / "out", tmp_path / "base", targets=["q"], modules=["lm_head"])
    with pytest.raises(ModelError, match="--merged"):
        export_command(tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    export_command(tmp_path / "out", "gguf", merged=True)
    found = tensors(tmp_path / "out-merged.gguf")
    head = lora_layers(model)["lm_head"].merged().weight.numpy()
    np.testing.assert_allclose(found["output.weight"], head, atol=1e-6)
    np.testing.assert_array_equal(found["token_embd.weight"], model.get_input_embeddings().weight.detach().numpy())


def test_biases_of_a_llama_are_interleaved_too(tmp_path, capsys):
    model = write_model(tmp_path / "base", "llama", attention_bias=True)
    export_command(tmp_path / "base", "gguf")
    assert "does not read attention_bias" in capsys.readouterr().out
    found, attention = tensors(tmp_path / "base.gguf"), model.model.layers[1].self_attn
    np.testing.assert_array_equal(as_transformers(found["blk.1.attn_q.bias"], HEADS), attention.q_proj.bias.detach())
    np.testing.assert_array_equal(as_transformers(found["blk.1.attn_k.bias"], KV_HEADS), attention.k_proj.bias.detach())
    np.testing.assert_array_equal(found["blk.1.attn_v.bias"], attention.v_proj.bias.detach())


@pytest.mark.parametrize("dtype, kind", [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_matrices_have_the_dtype_and_vectors_float32(tmp_path, dtype, kind):
    model = case(tmp_path, "llama")
    export_command(tmp_path / "out", "gguf", merged=True, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out-merged.gguf")
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1} == {kind}
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 1} == {"F32"}
    up = lora_layers(model)["model.layers.0.mlp.up_proj"].merged().weight.to(getattr(torch, dtype)).float()
    found = tensors(tmp_path / "out-merged.gguf")["blk.0.ffn_up.weight"]
    np.testing.assert_allclose(found, up.numpy(), rtol=2 * torch.finfo(getattr(torch, dtype)).eps, atol=1e-6)
    assert np.array_equal(torch.from_numpy(found.copy()).to(getattr(torch, dtype)).float().numpy(), found)


def test_a_sliding_window_is_told(tmp_path, capsys):
    write_model(tmp_path / "base", "mistral", sliding_window=16)
    export_command(tmp_path / "base", "gguf")
    out = capsys.readouterr().out
    assert "the last 16 positions" in out and "does not read sliding_window" in out


def test_llama_3s_frequencies(tmp_path):
    rope = dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope["original_max_position_embeddings"] = 64
    model = write_model(tmp_path / "base", "llama", rope_parameters=rope)
    export_command(tmp_path / "base", "gguf")
    slower = tensors(tmp_path / "base.gguf")["rope_freqs.weight"]
    plain = 10_000.0 ** -(np.arange(0, HEAD, 2) / HEAD)
    np.testing.assert_allclose(plain / slower, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert slower[0] == 1 and slower[-1] == 8


@pytest.mark.parametrize(
    "family, settings, said",
    [
        ("llama", dict(hidden_act="gelu"), "gelu"),
        ("qwen3", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), "yarn"),
    ],
)
def test_variants_that_llama_cpp_computes_otherwise_are_refused(tmp_path, family, settings, said):
    case(tmp_path, family, **settings)
    with pytest.raises(ModelError, match=said):
        export_command(tmp_path / "out", "gguf")


@pytest.mark.parametrize("family", ["gpt2", "gemma", "smollm3"])
def test_other_families_are_refused_by_name(tmp_path, family):
    write_base(tmp_path / "base", family)
    write_adapter(tmp_path / "out", tmp_path / "base", targets=["q"])
    for merged in (False, True):
        with pytest.raises(ModelError, match=f"'{family}'"):
            export_command(tmp_path / "out", "gguf", merged=merged)


def bpe(pre_tokenizer, decoder=None, normalizer=None, **settings):
    backend = Tokenizer(models.BPE(**settings))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder or decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] * bool(settings.get("byte_fallback"))
    alphabet = [] if settings.get("byte_fallback") else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT, TEXT.replace(" ", ": ")] * 3, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def split(regex):
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS = {
    "gpt-2": lambda: bpe(BYTES),
    "smollm": lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])),
    "llama-bpe": lambda: bpe(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: bpe(split(QWEN2), normalizer=normalizers.NFC()),
    "tekken": lambda: bpe(split(TEKKEN), ignore_merges=True),
    "default": lambda: bpe(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]),
        byte_fallback=True,
        unk_token="<unk>",
    ),
}
SENTENCES = [TEXT, "the film was sad: great movie", "it's  a 12 movie\n\nnew", "Überfilm 日本 🙂 bad"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_is_named_and_read_back_with_the_same_ids(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    write_model(tmp_path / "base", "llama", tokenizer)
    export_command(tmp_path / "base", "gguf", verify=False)
    about = fields(tmp_path / "base.gguf")
    assert about["tokenizer.ggml.pre"] == kind
    assert about["tokenizer.ggml.model"] == ("llama" if kind == "default" else "gpt2")
    assert about["tokenizer.chat_template"] == tokenizer.chat_template
    assert (about["tokenizer.ggml.bos_token_id"], about["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert about["tokenizer.ggml.add_bos_token"] is False
    assert len(about["tokenizer.ggml.tokens"]) == len(tokenizer) + 3 == about["llama.vocab_size"]
    assert about["tokenizer.ggml.token_type"][-3:] == [gguf.TokenType.UNUSED] * 3
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    for sentence in SENTENCES:
        assert read(sentence, add_special_tokens=False)["input_ids"] == tokenizer(sentence)["input_ids"]


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES])),
        lambda: bpe(BYTES, normalizer=normalizers.Lowercase()),
        lambda: bpe(BYTES, ignore_merges=True),
    ],
)
def test_a_tokenizer_that_splits_otherwise_is_refused_but_the_adapter_alone_is_not(tmp_path, tokenizer):
    write_model(tmp_path / "base", "llama", tokenizer())
    write_adapter(tmp_path / "out", tmp_path / "base")
    with pytest.raises(ModelError, match="splits text"):
        export_command(tmp_path / "out", "gguf", merged=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    export_command(tmp_path / "out", "gguf")


def test_a_wrong_file_fails_its_verification_and_is_not_kept(tmp_path, monkeypatch):
    from lora_ft.commands.export import gguf_model

    case(tmp_path, "llama")
    monkeypatch.setattr(gguf_model, "reordered", lambda order, name, tensor: tensor)
    with pytest.raises(ModelError, match="failed its verification"):
        export_command(tmp_path / "out", "gguf", merged=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("merged", [False, True])
def test_a_disk_without_room_for_the_last_tensor_is_told(tmp_path, merged):
    resource = pytest.importorskip("resource", reason="Windows has no limit of a file's size")
    case(tmp_path, "llama")
    target = tmp_path / "x.gguf"
    export_command(tmp_path / "out", "gguf", output=target, merged=merged)
    size = target.stat().st_size
    target.unlink()
    target.with_suffix(".Modelfile").unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 8, limit[1]))
    try:
        with pytest.raises(FilesError, match="can't be written"):
            export_command(tmp_path / "out", "gguf", output=target, merged=merged, verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_another_base_is_refused(tmp_path):
    case(tmp_path, "llama")
    write_model(tmp_path / "other", "llama", rms_norm_eps=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    shake(model)
    model.save_pretrained(tmp_path / "other")
    for to in ("gguf", "peft", "merged"):
        with pytest.raises(ModelError, match="fingerprint"):
            export_command(tmp_path / "out", to, base=str(tmp_path / "other"))


def test_options_that_do_not_go_together(tmp_path):
    case(tmp_path, "llama")
    for to, options in (("peft", {"merged": True}), ("merged", {"dtype": "float16"}), ("gguf", {"public": True})):
        with pytest.raises(ConfigError, match="go"):
            export_command(tmp_path / "out", to, **options)
    with pytest.raises(ConfigError, match="complete model"):
        export_command(tmp_path / "base", "peft")
    (tmp_path / "out-lora.gguf").write_text("mine")
    with pytest.raises(FilesError, match="exists"):
        export_command(tmp_path / "out", "gguf")
    assert (tmp_path / "out-lora.gguf").read_text() == "mine"
    assert read_adapter(Trained.open(tmp_path / "out")).tensors and load_adapter
