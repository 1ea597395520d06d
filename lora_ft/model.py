"""Loading of models and tokenizers, checked before they are believed. The only caller of `from_pretrained`."""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.base import Base, digest, stored_dtype
from lora_ft.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(base: Base, trust_remote_code: bool = False):
    """The base's transformers config; ModelError when it is not of a causal language model that transformers knows."""
    try:
        config = AutoConfig.from_pretrained(
            base.folder, trust_remote_code=trust_remote_code, **({"gguf_file": base.gguf.name} if base.gguf else {})
        )
    except Exception as e:
        raise ModelError(
            f"model {base.name}: its config can't be used: {_first_line(e)}{_code_hint(base, trust_remote_code)}"
        ) from e
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {base.name}: {config.model_type} is an encoder-decoder, not a causal language model.")
    return config


def skeleton(base: Base, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, no weights and no memory."""
    config = load_config(base, trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise ModelError(
            f"model {base.name}: can't be built: {_first_line(e)}{_code_hint(base, trust_remote_code)}"
        ) from e


def load_base(base: Base, dtype: str = "auto", trust_remote_code: bool = False, device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model in eval mode, checked: every weight there, in shape, and finite.

    Args:
        dtype: "auto" (as stored; float16 becomes float32 on CPU), "float32", "bfloat16" or "float16".

    Raises:
        ModelError: unknown architecture, code of its own, missing or damaged weights, NaN or inf (the tensor is named).
    """
    stored = stored_dtype(base)
    wanted = DTYPES.get(dtype, torch.float32 if stored is torch.float16 and device == "cpu" else stored)
    config = load_config(base, trust_remote_code)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder,
            config=None if base.gguf else config,
            dtype=wanted,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if base.gguf else not base.pickles,
            output_loading_info=True,
            **({"gguf_file": base.gguf.name} if base.gguf else {}),
        )
    except Exception as e:
        if isinstance(e, MemoryError) or "allocate memory" in str(e):
            raise
        raise ModelError(
            f"model {base.name}: can't be loaded: {_first_line(e)}{_code_hint(base, trust_remote_code)}"
        ) from e
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(n) for n in info.get(kind) or ()):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(f"model {base.name}: {kind.replace('_', ' ')} in its weights: {shown}.")
    if base.gguf:  # dequantized on load: an ordinary model from here on
        del model.hf_quantizer, model.config.quantization_config
        model.is_quantized = False
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not all(torch.isfinite(v) for v in torch.aminmax(tensor.detach())):
            raise ModelError(f"model {base.name}: the weight {name} holds NaN or inf.")
    return model.to(device).eval()


def load_tokenizer(base: Base, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base's fast tokenizer.

    Raises:
        ModelError: none in the folder, or a slow one (character offsets are needed to mask chats rightly).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, trust_remote_code=trust_remote_code, **({"gguf_file": base.gguf.name} if base.gguf else {})
        )
    except Exception as e:
        raise ModelError(f"model {base.name}: its tokenizer can't be loaded: {_first_line(e)}") from e
    if not tokenizer.is_fast:
        raise ModelError(f"model {base.name}: its tokenizer has no fast version (tokenizer.json), which is needed.")
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into ids: vocabulary, merges, normalization and special tokens, without the chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # set anew by every call
    return digest([backend, sorted(map(str, tokenizer.all_special_tokens))])


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def _code_hint(base: Base, trusted: bool) -> str:
    config = base.folder / "config.json"
    if not trusted and not base.gguf and config.is_file() and '"auto_map"' in config.read_text(errors="replace"):
        return " It asks to run code of its own: read that code, then add --trust-remote-code if you trust it."
    return ""
