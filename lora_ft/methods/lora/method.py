"""LoRA as one of the methods; all of it is in lora_ft.methods.lora."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.adapter_settings import AdapterConfig
from lora_ft.methods.lora.files import CONFIG, WEIGHTS, initialize_from, load_adapter, save_adapter, slices
from lora_ft.methods.lora.inject import bare, inject_lora

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


def load(model: PreTrainedModel, folder: Path) -> None:
    load_adapter(model, folder)


def load_into(model: PreTrainedModel, folder: Path) -> None:
    initialize_from(model, folder)
