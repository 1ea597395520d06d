"""Write a complete model as one GGUF file (weights, hyperparameters, tokenizer) and verify that it computes the same."""

import gc
from functools import partial
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_ft.commands.export.gguf_format import Weight, by_number, gguf_name, layout, reordered, write_gguf
from lora_ft.commands.export.gguf_vocabulary import write_vocabulary
from lora_ft.core.errors import ModelError
from lora_ft.core.names import published_name
from lora_ft.methods.lora.compatibility import check_against
from lora_ft.methods.lora.files import apply_adapter
from lora_ft.methods.lora.merge_shards import DTYPES, check_stored_copies, finite, merged, stored_keys
from lora_ft.methods.lora.peft import AdapterFile
from lora_ft.methods.lora.stored_names import Edit, plan_edits, source_of, stored_names
from lora_ft.methods.lora.verify import largest, logits, sample_rows
from lora_ft.model.files import Base, opened, weight_files
from lora_ft.model.load import load_base, load_model_config, load_tokenizer, skeleton
from lora_ft.model.stored import stored_dtype

# Settings that change the logits and that transformers does not read from every GGUF
COMPARED = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "sliding_window"),
    "rope_parameters",
)


def write_model_gguf(base: Base, path: Path, dtype: str, adapter: AdapterFile | None = None) -> int:
    """Write a model, merged with an adapter if there is one, with one tensor in memory at a time.

    Matrices are written in `dtype`, vectors in float32. Returns the file's size in bytes.

    Raises:
        ModelError: the family or the tokenizer is not supported; a weight is quantized or missing.
    """
    model, tokenizer, shards = skeleton(base), load_tokenizer(base), weight_files(base)
    shard_of = {key: shard for shard in shards for key in stored_keys([shard])}
    order, on_disk = layout(model.config), stored_names(model, shard_of)
    edits: dict[str, Edit] = {}
    if adapter is not None:
        check_against(model, adapter)
        check_stored_copies(model, adapter, shards, on_disk)
        planned, _ = plan_edits(model, on_disk, shard_of, adapter.tensors)
        edits = {f"{edit.module}.weight": edit for edit in planned if edit.module is not None}

    def read(name: str, source: str) -> Tensor:
        """The weight `name`, stored as `source`, merged with the adapter if it is adapted, in llama.cpp's row order."""
        shard = shard_of[source]
        with opened(shard) as file:
            tensor = finite(file, source, shard)
            if tensor.dtype not in DTYPES:
                raise ModelError(f"{shard}: {source} is {tensor.dtype}: quantized weights can't be exported.")
            if adapter is not None and name in edits:
                tensor, _ = merged(tensor, edits[name], adapter, shard)
            return reordered(order, name, tensor)

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = []
    # A tied head is a separate tensor only if it is adapted.
    for name in sorted(shapes.keys() - (model.all_tied_weights_keys.keys() - edits.keys()), key=by_number):
        source = source_of(model, on_disk, name)
        if source is None:
            raise ModelError(f"model {base.name}: its files have no separate tensor for {name}. Copy the model again.")
        weights.append(Weight(gguf_name(order, name), shapes[name], partial(read, name, source)))
    if (frequencies := rope_frequencies(model.config)) is not None:
        weights.append(Weight("rope_freqs.weight", tuple(frequencies.shape), frequencies.clone))
    writer = gguf.GGUFWriter(path, order.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(published_name(base.name)).name)
    write_hyperparameters(writer, model.config)
    own_template = adapter.trained.chat_template if adapter else None
    write_vocabulary(writer, tokenizer, model.config.vocab_size, own_template or tokenizer.chat_template)
    return write_gguf(writer, weights, dtype)


def write_hyperparameters(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Add the hyperparameters of a Llama-like model."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters or {}
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_frequencies(config: PretrainedConfig) -> Tensor | None:
    """Llama 3.1's scaling of rotary frequencies in llama.cpp's form: (head_dim / 2,) unscaled / scaled; None without it."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 2 * len(scaled), 2).float() / (2 * len(scaled)))
    return plain / scaled


def verify_gguf(path: Path, dtype: str, base: Base, adapter: AdapterFile | None = None) -> str:
    """Load the file with transformers and compare its logits with those of base (and adapter), in float32.

    One model is in memory at a time. Returns the result in words: the difference, or why nothing was compared, since
    transformers does not read everything from a GGUF that llama.cpp does.

    Raises:
        ModelError: the logits differ by more than rounding can explain.
    """
    written, stored = Base(path.name, path.parent, gguf=path), str(stored_dtype(base)).removeprefix("torch.")
    config, config_read = load_model_config(base), load_model_config(written)
    if lost := [name for name in COMPARED if _setting(config, name) != _setting(config_read, name)]:
        return f"logits were not compared (transformers does not read {', '.join(lost)} from a GGUF)"
    rows = sample_rows(adapter.trained.record if adapter else {}, load_tokenizer(base), config.vocab_size)
    model = load_base(base, "float32")
    if adapter is not None:
        apply_adapter(model, adapter)
    exact = logits(model, rows)
    del model
    gc.collect()
    model = load_base(written, "float32")
    difference, row, position = largest(logits(model, rows), exact)
    scale = max(t.abs().max().item() for t in exact)
    roundings = {dtype, stored} if adapter else {dtype} - {stored}  # a merge rounds to the stored dtype first
    allowed = scale * max([1e-4, *(8 * torch.finfo(getattr(torch, kind)).eps for kind in roundings)])
    if not difference <= allowed:
        raise ModelError(
            f"the GGUF failed its verification: logits differ by {difference:.3g} in sample row {row}, position {position}, "
            f"where {allowed:.3g} is allowed (largest logit {scale:.3g}). The output was not kept."
        )
    return f"logits, read back by transformers: {difference:.3g} off at most ({allowed:.3g} allowed)"


def _setting(config: PretrainedConfig, name: str):
    """A setting, rounded to float32 as in a GGUF. A Mistral is a Llama there."""
    value = getattr(config, name, None)
    if name == "model_type":
        return "llama" if value == "mistral" else value
    if name == "head_dim":
        return value or config.hidden_size // config.num_attention_heads
    if name == "rope_parameters":
        return {key: _float32(v) for key, v in (value or {}).items()}
    return _float32(value) or None


def _float32(value):
    return torch.tensor(value).item() if isinstance(value, float) else value
