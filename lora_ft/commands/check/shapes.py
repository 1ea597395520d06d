"""`lora-ft check --shape`: parameters and memory of a model from its shape alone, LoRA beside full fine-tuning.

Nothing is loaded or allocated, so GPT-3 175B fits on a laptop.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from rich.table import Table
from transformers import GPT2Config, PretrainedConfig, PreTrainedModel

from lora_ft.commands.check import display
from lora_ft.commands.check.command import sizes
from lora_ft.commands.check.memory import Row, estimate
from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import echo_json, format_bytes
from lora_ft.core.paths import local_path
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.methods.lora import method as lora
from lora_ft.methods.lora.inject import lora_layers
from lora_ft.model.files import Base
from lora_ft.model.load import DTYPES, build, load_model_config
from lora_ft.model.quantize import check_form, quantize
from lora_ft.nn.rows import Segment

# name -> shape. GPT-3 has GPT-2's blocks (Brown et al. 2020, table 2.1), in 16 bits as in the LoRA paper.
SHAPES: dict[str, dict] = {
    "gpt2": dict(n_embd=768, n_layer=12, n_head=12, dtype="float32"),
    "gpt2-medium": dict(n_embd=1024, n_layer=24, n_head=16, dtype="float32"),
    "gpt2-large": dict(n_embd=1280, n_layer=36, n_head=20, dtype="float32"),
    "gpt2-xl": dict(n_embd=1600, n_layer=48, n_head=25, dtype="float32"),
    "gpt3-6.7b": dict(n_embd=4096, n_layer=32, n_head=32, n_positions=2048, dtype="float16"),
    "gpt3-13b": dict(n_embd=5120, n_layer=40, n_head=40, n_positions=2048, dtype="float16"),
    "gpt3-175b": dict(n_embd=12288, n_layer=96, n_head=96, n_positions=2048, dtype="float16"),
}


def check_shape(shape: str, config: Config, *, as_json: bool = False, trust: Trust = NO_TRUST) -> None:
    """Print what training a model of this shape (see `shape_config`) needs, with the config's adapter and in full.

    Raises:
        ConfigError: the method is not lora.
        ModelError: an unknown shape; or the config's targets are not in the model.
    """
    if config.adapter.method != "lora":
        raise ConfigError(f"adapter.method: {config.adapter.method}; --shape compares lora with full fine-tuning only.")
    model_config = shape_config(shape, trust)
    stored = DTYPES.get(config.model.dtype) or getattr(model_config, "dtype", None) or torch.float32
    form = config.model.quantization
    check_form(form)
    # a row filled to micro_batch_tokens (for `auto` with one example of max_length), every token supervised
    setting, length = config.train.micro_batch_tokens, config.data.max_length
    examples = 1 if setting == "auto" else max(1, setting // length)
    row = Row([Segment(length)] * examples, examples * (length - 1))

    def with_lora(device: str = "cpu") -> PreTrainedModel:
        with torch.device(device):
            model = build(model_config, device, stored, trust.remote_code)
            if device != "meta":  # whose parameters are counted
                quantize(model, form)
            lora.inject(model, config.adapter, config.train.seed, None)
        return model

    def full() -> PreTrainedModel:
        return build(model_config, "cpu", torch.float32, trust.remote_code).requires_grad_(True)

    adapted, checkpointing = with_lora("meta"), config.train.gradient_checkpointing
    makers: dict[str, Callable[[], PreTrainedModel]] = {"lora": with_lora, "full": full}
    memory = {name: asdict(estimate(make, [row], checkpointing=checkpointing)) for name, make in makers.items()}
    facts = {
        "shape": shape,
        "dtype": str(stored).removeprefix("torch."),
        "quantization": form,
        **sizes(adapted, "lora"),
    }
    facts |= {"row_tokens": row.tokens, "memory": memory}
    if as_json:
        echo_json(facts)
    else:
        show(facts, adapted, config.adapter.rank)


def shape_config(shape: str, trust: Trust) -> PretrainedConfig:
    """The transformers config of a named shape, a folder or a file; a ModelError if it is none of these."""
    path = local_path(shape)
    if shape in SHAPES and not path.exists():
        return GPT2Config(vocab_size=50257, **SHAPES[shape])
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        names = ", ".join(SHAPES)
        raise ModelError(f"--shape {shape}: not a config.json, not a folder that has one, and not one of {names}.")
    return load_model_config(Base(shape, folder, trusted_code=trust.remote_code))


def show(facts: dict, adapted: PreTrainedModel, rank: int) -> None:
    """Print the facts for people, LoRA and full fine-tuning side by side."""
    out = display.console()
    trained = f"{facts['trainable_parameters']:,} trainable ({facts['trainable_share']:.2%})"
    ranks = f"  rank {rank}: {trained}, {format_bytes(facts['adapter_bytes'])} on disk"
    title = f"{facts['shape']}: {facts['base_parameters']:,} parameters, {facts['quantization'] or facts['dtype']}"
    display.section(out, title, [*display.target_lines(lora_layers(adapted)), ranks])
    title = f"GPU memory, rows of {facts['row_tokens']:,} tokens, Adam"
    table = Table("", title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("LoRA", "full fine-tuning"):
        table.add_column(column, justify="right")
    names = {"adapter": "trained weights and gradients", "weights": "frozen weights"}
    for name, value in facts["memory"]["lora"].items():
        full_value = facts["memory"]["full"][name]
        if value or full_value:
            table.add_row(names.get(name, name), format_bytes(value), format_bytes(full_value))
    out.print()
    out.print(table)
    out.print("Full fine-tuning trains float32 weights: 16 bytes each, with gradient and Adam's two moments.")
