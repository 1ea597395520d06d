"""Loading of models and tokenizers, checked before they are believed. The only caller of `from_pretrained`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_ft.core.errors import ConfigError, ModelError, is_memory
from lora_ft.core.messages import info, printable
from lora_ft.model.files import Base, digest, stored_dtype
from lora_ft.nn.mlp import fuse_gelu

CONFIGS = ("config.json", "generation_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model_config(base: Base, trust_remote_code: bool = False):
    """The base's transformers config; ModelError when it is not of a causal language model that transformers knows."""
    for path in (base.folder / name for name in CONFIGS):  # transformers takes a damaged one of the second for none
        if not base.gguf and path.is_file() and (problem := _damage(path)):
            raise ModelError(f"{path}: {problem}. Copy the file again.")
    with _as_model_error(base, "its config can't be used", trust_remote_code):
        config = AutoConfig.from_pretrained(
            base.folder, trust_remote_code=trust_remote_code, **({"gguf_file": base.gguf.name} if base.gguf else {})
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {base.name}: {config.model_type} is an encoder-decoder, not a causal language model.")
    return config


def skeleton(
    base: Base, trust_remote_code: bool = False, *, device: str = "meta", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, no weights and no memory.

    Where tensors have no values (FakeTensorMode), `device` is the one to pretend; dtype: None for the config's.
    """
    config = load_model_config(base, trust_remote_code)
    with _as_model_error(base, "can't be built", trust_remote_code):
        return build(config, device, dtype, trust_remote_code)


def build(
    config: PretrainedConfig, device: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A new model of a config, as it computes here; for the meta device, or where tensors have no values."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    fuse_gelu(model)
    return model


def dtype_of(base: Base, dtype: str, device: str) -> torch.dtype:
    """What "auto" (as stored; float16 becomes float32 on CPU), "float32", "bfloat16" or "float16" mean for this base."""
    if dtype in DTYPES:
        return DTYPES[dtype]
    stored = stored_dtype(base)
    return torch.float32 if stored is torch.float16 and device == "cpu" else stored


def end_tokens(base: Base, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids at which generation stops: the tokenizer's end of sequence, and those of the base's generation config."""
    path = base.folder / "generation_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() and not base.gguf else {}
    listed = settings.get("eos_token_id")
    found = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return {i for i in found if isinstance(i, int)}


def load_base(base: Base, dtype: str = "auto", trust_remote_code: bool = False, device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model in eval mode, checked: every weight there, in shape, and finite.

    Args:
        dtype: "auto" (as stored; float16 becomes float32 on CPU), "float32", "bfloat16" or "float16".

    Raises:
        ModelError: unknown architecture, code of its own, missing or damaged weights, NaN or inf (the tensor is named).
    """
    wanted = dtype_of(base, dtype, device)
    config = load_model_config(base, trust_remote_code)
    with _as_model_error(base, "can't be loaded", trust_remote_code):
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder,
            config=None if base.gguf else config,
            dtype=wanted,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if base.gguf else not base.pickles,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **({"gguf_file": base.gguf.name} if base.gguf else {}),
        )
    missing = sorted(info["missing_keys"])
    other = [f"{n} is {tuple(a)}, its config says {tuple(b)}" for n, a, b in sorted(info["mismatched_keys"])]
    for what, names in (("weights are missing", missing), ("weights have another shape", other)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(f"model {base.name}: {what}: {shown}. Copy the model again.")
    if base.gguf:  # dequantized on load: an ordinary model from here on
        del model.hf_quantizer, model.config.quantization_config
        model.is_quantized = False
    fuse_gelu(model)
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not all(torch.isfinite(v) for v in torch.aminmax(tensor.detach())):
            raise ModelError(f"model {base.name}: the weight {name} holds NaN or inf.")
    return model.to(device).eval()


def load_tokenizer(base: Base, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base's fast tokenizer.

    Raises:
        ModelError: none in the folder, or a slow one (character offsets are needed to mask chats rightly).
    """
    with _as_model_error(base, "its tokenizer can't be loaded", trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, trust_remote_code=trust_remote_code, **({"gguf_file": base.gguf.name} if base.gguf else {})
        )
    if not tokenizer.is_fast:
        raise ModelError(f"model {base.name}: its tokenizer has no fast version (tokenizer.json), which is needed.")
    return tokenizer


def check_vocabulary(model: PreTrainedModel, base: Base, largest_id: int) -> None:
    """ModelError if the model has no embedding for an id that its tokenizer gives."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(
            f"model {base.name}: its tokenizer gives the id {largest_id}, its weights know only {rows} ids: they aren't of "
            "one model. Restore the tokenizer's files."
        )


def check_length(model: PreTrainedModel, base: Base, longest: int) -> None:
    """Whether the model has positions for its longest example.

    Raises:
        ConfigError: its table of positions (GPT-2, OPT, GPT-J) ends before. Where positions are computed (RoPE), it is
            only said that it goes beyond what the base was made for.
    """
    known = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(known, int) or longest <= known:
        return
    others = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings())
    tabled = any(m.num_embeddings - known in (0, 1, 2) for m in others)  # OPT's table has two rows more
    tabled = tabled or any(name.endswith("embed_positions") for name, _ in model.named_buffers())
    message = f"data.max_length: the longest example has {longest:,} tokens, model {base.name} positions for {known:,}"
    if tabled:
        raise ConfigError(f"{message}. Set data.max_length to {known} at most.")
    info(f"note: {message}. It works, but the base hasn't learned them; data.max_length: {known} would cut there.")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into ids: vocabulary, merges, normalization and special tokens, without the chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # set anew by every call
    return digest([backend, sorted(map(str, tokenizer.all_special_tokens))])


@contextmanager
def _as_model_error(base: Base, what: str, trusted: bool) -> Iterator[None]:
    """What transformers makes of a base, of which any class of exception may come, as a ModelError; damaged files are named."""
    try:
        yield
    except Exception as e:
        if is_memory(e):
            raise
        for path in sorted(base.folder.glob("*.json")):
            if problem := _damage(path):
                raise ModelError(f"{path}: {problem}. Copy the file again.") from e
        why = printable(" ".join(str(e).split()) or type(e).__name__, 400)
        raise ModelError(f"model {base.name}: {what}: {why}{_code_hint(base, trusted)}") from e


def _damage(path: Path) -> str | None:
    """What is wrong with a JSON file of a base's, if anything."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        return f"not valid JSON ({e})"
    objects = path.name in (*CONFIGS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return f"holds a {type(content).__name__}, not an object" if objects and not isinstance(content, dict) else None


def _code_hint(base: Base, trusted: bool) -> str:
    config = base.folder / "config.json"
    if not trusted and not base.gguf and config.is_file() and '"auto_map"' in config.read_text(errors="replace"):
        return " It asks to run code of its own: read that code, then add --trust-remote-code if you trust it."
    return ""
