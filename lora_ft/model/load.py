"""Loading models and tokenizers, with every check that transformers leaves out. The only caller of `from_pretrained`."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_ft.core.errors import ModelError, UserError, is_out_of_memory
from lora_ft.core.machine import keep_freed_memory
from lora_ft.core.messages import info, listed, printable, working
from lora_ft.model.config_files import CONFIGS, MOST_MODULES, SMALL_LIMIT, absurd_count, check_config_files, damage
from lora_ft.model.device import computes
from lora_ft.model.files import Base, digest
from lora_ft.model.new_tokens import add_rows, add_to_tokenizer
from lora_ft.model.quantize import Quantization, check_form, forget, quantize, refuse_quantized
from lora_ft.model.stored import is_finite, shape_and_dtype, stored_dtype, stored_weights
from lora_ft.nn.forms import Form
from lora_ft.nn.mlp import fuse_gelu

_hashes: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()  # of `tokenizer_hash`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model_config(base: Base) -> PretrainedConfig:
    """The base's transformers config. Raises ModelError if it is damaged, absurd, or of no causal language model."""
    check_config_files(base)
    with _as_model_error(base, "its config can't be used"):
        config = AutoConfig.from_pretrained(base.folder, **_options(base))
        # a config may not choose kernels, or attention that `nn/attention.py` was not made for
        config._attn_implementation = config._experts_implementation = config.transformers_weights = None
    if base.gguf and (count := absurd_count(config.to_dict())):
        raise ModelError(f"model {base.name}: {count}; the limit is {MOST_MODULES:,}. Copy the file again.")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {base.name}: {config.model_type} is an encoder-decoder, not a causal language model.")
    for part in (config, config.get_text_config()):
        padding, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(padding, int) and isinstance(size, int) and not 0 <= padding < size:
            part.pad_token_id = None  # -1, say: torch refuses an id that has no embedding, and padding is not used
    return config


def skeleton(base: Base, *, device: str = "meta", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model without weights: its modules, shapes and configs on the meta device, at no cost in memory.

    device: another one only under FakeTensorMode, where tensors have no values. dtype: None for that in the config. Raises
    ModelError as `load_model_config`, or if transformers can't build the model.
    """
    config = load_model_config(base)
    with _as_model_error(base, "can't be built"):
        model = build(config, device, dtype, base.trusted_code)
        if not base.gguf:
            _check_size(model, base)
            if model.can_generate():  # the settings of an old model are in its config.json
                own = (base.folder / CONFIGS[1]).is_file()
                model.generation_config = GenerationConfig.from_pretrained(
                    base.folder, config_file_name=CONFIGS[1] if own else CONFIGS[0], _from_model_config=not own
                )
        if base.new_tokens:
            add_rows(model, load_tokenizer(base), base.new_tokens)
    return model


def build(
    config: PretrainedConfig, device: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A new model from a config, with our fused operations; for the meta device or under FakeTensorMode."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    fuse_gelu(model)
    return model


def dtype_of(base: Base, dtype: str, device: str) -> torch.dtype:
    """The torch dtype for a `model.dtype` setting: "auto" is the stored one, or float32 if the device can't compute in it."""
    if dtype in DTYPES:
        return DTYPES[dtype]
    stored = stored_dtype(base)
    return stored if computes(stored, device) else torch.float32


def load_base(
    base: Base, dtype: str = "auto", device: str = "cpu", quantization: Form | None = None
) -> PreTrainedModel:
    """Load a causal language model in eval mode, and check that every weight is there, has its shape and is finite.

    Its weights are those of `stored_weights`, which the fingerprint covers; nothing beside them is applied.
    dtype: a `model.dtype` setting, see `dtype_of`. quantization: of the blocks' linear weights, see `model/quantize.py`.

    Raises:
        ConfigError: quantization needs a package that is not installed.
        ModelError: an unknown architecture, remote code that is not trusted, missing or damaged weights, integers where
            the model has floating-point numbers, NaN or inf.
    """
    config = load_model_config(base)
    options = {"dtype": dtype_of(base, dtype, device)}
    if quantization:
        check_quantization(base, quantization)
        check_weights(base)  # the quantizer compares no shapes
        keep_freed_memory(2**20)
    with working(f"loading {base.name}", in_pipes=True):
        model = _load(base, config, options, form=quantization)
    if base.gguf:  # dequantized while loading, so it is an ordinary model from here on
        del model.hf_quantizer, model.config.quantization_config
        model.is_quantized = False
        if quantization:
            info(f"note: {base.name} is dequantized to {options['dtype']}, then quantized as {quantization}")
            quantize(model, quantization)
    fuse_gelu(model)
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ModelError(f"model {base.name}: the weight {name} holds NaN or inf.")
    if base.new_tokens:
        add_rows(model, load_tokenizer(base), base.new_tokens)
    return model.to(device).eval()


def check_quantization(base: Base, form: Form) -> None:
    """Raise ConfigError if a package is missing, ModelError if the base is stored in few bits already."""
    check_form(form)
    refuse_quantized(base.name, load_model_config(base))


def check_weights(base: Base) -> None:
    """Raise the errors of `load_base` that follow from the names, types and shapes of its weights; none of them is read."""
    config = load_model_config(base)
    if not base.gguf and not hasattr(config, "quantization_config"):
        _load(base, config, {"device_map": "meta"}, device="meta")


def _load(
    base: Base, config: PretrainedConfig, options: dict[str, Any], device: str = "cpu", form: Form | None = None
) -> PreTrainedModel:
    """The model with its stored weights, quantized to `form` while they are read (those of a .gguf are not); ModelError if one
    is missing or of another shape. device: of a pickle's tensors."""
    options = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}  # these are named below
    integers: list[str] = []
    with _as_model_error(base, "can't be loaded"):
        if base.gguf:  # transformers would apply an adapter that is beside it
            model, loading = AutoModelForCausalLM.from_pretrained(
                base.folder, adapter_kwargs={"subfolder": "no adapter"}, **options, **_options(base)
            )
        else:
            empty = skeleton(base, dtype=options.get("dtype"))
            with stored_weights(base, device, one_by_one=bool(form)) as weights:
                if not hasattr(empty.config, "quantization_config"):
                    integers = _remove_integers(empty, weights)
                settings = Quantization(form, weights) if form else None
                how = {"config": config, "state_dict": weights, "quantization_config": settings}
                model, loading = type(empty).from_pretrained(None, **how, **options)
                if settings:
                    forget(model, settings)
            model.generation_config = empty.generation_config
    shapes = [f"{n} is {tuple(a)}, its config says {tuple(b)}" for n, a, b in sorted(loading["mismatched_keys"])]
    absent = f"weights are missing{f', or are integers in its files ({listed(integers, 5)})' if integers else ''}"
    for problem, names in ((absent, sorted(loading["missing_keys"])), ("weights have another shape", shapes)):
        if names:
            raise ModelError(f"model {base.name}: {problem}: {listed(names, 5)}. Copy the model again.")
    return model


def _check_size(model: PreTrainedModel, base: Base) -> None:
    """Refuse a config of far more parameters than the files hold, before they are allocated."""
    needed = sum(p.numel() for p in model.parameters())
    with stored_weights(base, "meta") as weights:
        stored = sum(math.prod(shape_and_dtype(weight)[0]) for weight in weights.values())
    if needed > 8 * stored + 10**6:  # quantized ones are several in a number
        raise ModelError(
            f"model {base.name}: its config is of {needed:,} parameters, its files have {stored:,}: weights are missing, "
            "or the config is another model's. Copy the model again."
        )


def _remove_integers(model: PreTrainedModel, weights: dict[str, Any]) -> list[str]:
    """Remove the tensors that aren't floating-point, such as masks of old files; returns their names.

    What the model has as integers too stays. Loading then misses a weight that is one of those removed.
    """
    wanted = [name for name, value in model.state_dict().items() if not value.is_floating_point()]
    removed = [name for name, weight in weights.items() if shape_and_dtype(weight)[1] is None]
    removed = [name for name in removed if not any(w.endswith(name) or name.endswith(w) for w in wanted)]
    for name in removed:
        del weights[name]
    return removed


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's fast tokenizer, with its new tokens. Raises ModelError if there is only a slow one, which has no offsets."""
    check_config_files(base)  # a tokenizer's class follows from it
    with _as_model_error(base, "its tokenizer can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(base.folder, **_options(base))
        tokenizer.decode(tokenizer("a")["input_ids"])  # settings of a wrong type fail only in use
    if not tokenizer.is_fast:
        raise ModelError(f"model {base.name}: its tokenizer has no fast version (tokenizer.json), which is needed.")
    largest, count = max(tokenizer.get_vocab().values(), default=0), len(tokenizer)
    if largest > 8 * count + 10**6:  # the tokenizer would count up to it whenever it is written
        raise ModelError(f"model {base.name}: its tokenizer of {count:,} tokens has the id {largest:,}. Copy it again.")
    add_to_tokenizer(tokenizer, base.new_tokens)
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into ids: vocabulary, merges, normalization and special tokens, not the chat template."""
    if tokenizer not in _hashes:  # a large vocabulary takes a second
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["truncation"] = backend["padding"] = None  # every call sets them
        _hashes[tokenizer] = digest([backend, sorted(map(str, tokenizer.all_special_tokens))])
    return _hashes[tokenizer]


def _options(base: Base) -> dict[str, Any]:
    """The arguments that every `from_pretrained` needs for this base."""
    return {"trust_remote_code": base.trusted_code} | ({"gguf_file": base.gguf.name} if base.gguf else {})


@contextmanager
def _as_model_error(base: Base, what: str) -> Iterator[None]:
    """Turn whatever transformers raises about a base into a ModelError that names a damaged file if there is one."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise
        for path in sorted(p for p in base.folder.glob("*.json") if p.stat().st_size <= SMALL_LIMIT):
            if problem := damage(path):
                raise ModelError(f"{path}: {problem}. Copy the file again.") from e
        why = printable(" ".join(str(e).split()) or type(e).__name__, 400)
        raise ModelError(f"model {base.name}: {what}: {why}{_code_hint(base)}") from e


def _code_hint(base: Base) -> str:
    config = base.folder / CONFIGS[0]
    if base.trusted_code or base.gguf or not config.is_file():
        return ""
    hint = " It needs to run its own Python code: read that code, then add --trust-remote-code if you trust it."
    return hint if '"auto_map"' in config.read_text("utf-8", "replace") else ""
