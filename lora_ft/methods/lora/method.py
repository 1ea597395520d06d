"""LoRA as one of the methods; all of it is in lora_ft.methods.lora."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import AdapterConfig
from lora_ft.methods.lora.files import CONFIG, WEIGHTS, apply_adapter, initialize_from, save_adapter, slices
from lora_ft.methods.lora.inject import bare, inject_lora
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained

__all__ = ["bare", "inject", "load", "load_into", "save"]


def inject(
    model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    adapted = inject_lora(
        model,
        settings.targets,
        settings.rank,
        settings.alpha,
        dropout=settings.dropout,
        rslora=settings.rslora,
        modules=settings.modules,
        layers=settings.layers,
        seed=seed,
    )
    return f"{len(adapted)} modules"


def save(
    model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], dict]:
    save_adapter(model, folder, base_name)
    return [WEIGHTS, CONFIG], {"slices": slices(model)}


def load(model: PreTrainedModel, trained: Trained) -> None:
    apply_adapter(model, read_adapter(trained))


def load_into(model: PreTrainedModel, trained: Trained) -> None:
    initialize_from(model, read_adapter(trained))
