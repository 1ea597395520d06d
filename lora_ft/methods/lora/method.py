"""The four functions of method lora (see methods/interface.py)."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import AdapterConfig
from lora_ft.core.messages import listed
from lora_ft.methods.lora.files import CONFIG, WEIGHTS, apply_adapter, initialize_from, save_adapter
from lora_ft.methods.lora.inject import inject_lora
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.lora.token_rows import token_ids, train_rows
from lora_ft.methods.lora.whole import find_whole, train_whole
from lora_ft.methods.trained import Saved, Trained


def inject(
    model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """Add LoRA layers, see `inject_lora`, and train some modules, and the embedding's rows of some tokens, in full."""
    whole = find_whole(model, settings.train_modules)
    ids = token_ids(tokenizer, [*settings.train_tokens, *settings.add_tokens])
    shared = settings.model_dump(
        include={"targets", "rank", "alpha", "dropout", "rslora", "dora", "init", "modules", "layers"}
    )
    shared |= settings.model_dump(include={"exclude", "rank_pattern", "alpha_pattern"})
    adapted = inject_lora(model, **shared, seed=seed)
    train_whole(model, whole)
    if ids:
        train_rows(model, ids)
    full = [*whole, *([f"the rows of {len(ids)} tokens"] if ids else [])]
    return f"{len(adapted)} modules{', and in full ' + listed(full, 3) if full else ''}"


def save(model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase) -> Saved:
    """Write PEFT's two files; the record gets the parts of each module."""
    return [WEIGHTS, CONFIG], {"slices": save_adapter(model, folder, base_name)}


def load(model: PreTrainedModel, trained: Trained) -> None:
    """Put the adapter on the base; see `apply_adapter`."""
    apply_adapter(model, read_adapter(trained))


def load_into(model: PreTrainedModel, trained: Trained) -> None:
    """Copy the adapter's weights into the LoRA layers; see `initialize_from`."""
    initialize_from(model, read_adapter(trained))
