"""The five functions that every method has: inject, save, load, load_into, bare. The one module that knows all methods.

What trains is what `requires_grad` after `inject` (lora_ft.methods.lora.inject.trainable).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import AdapterConfig
from lora_ft.methods import bottleneck, full, prompt
from lora_ft.methods.lora import method as lora
from lora_ft.methods.prompt import virtual_ids
from lora_ft.methods.trained import Trained

__all__ = ["adds_parameters", "bare", "inject", "load", "load_into", "save", "virtual_ids"]


class Method(Protocol):
    """A method's module."""

    def inject(
        self, model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> str: ...

    def save(
        self, model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[str], dict]: ...

    def load(self, model: PreTrainedModel, trained: Trained) -> None: ...

    def load_into(self, model: PreTrainedModel, trained: Trained) -> None: ...

    def bare(self, model: PreTrainedModel) -> AbstractContextManager[None]: ...


METHODS: dict[str, Method] = {"lora": lora, "full": full, "bottleneck": bottleneck, "prompt": prompt}


def inject(model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Make `settings.method` of a bare base, in place: what trains has requires_grad, nothing else does.

    Returns what was adapted, in words ("60 modules").

    Raises:
        ModelError: the method, or a setting of it, doesn't fit this architecture.
    """
    return METHODS[settings.method].inject(model, settings, seed, tokenizer)


def adds_parameters(method: str) -> bool:
    """Whether what trains is added to the base's parameters, not some of them."""
    return method in ("lora", "bottleneck", "prompt")


def save(
    method: str, model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], dict]:
    """Write what was trained into an existing folder: (the names of its files, what the record must add)."""
    return METHODS[method].save(model, folder, base_name, tokenizer)


def load(model: PreTrainedModel, trained: Trained) -> None:
    """Put what a folder holds into a bare base.

    Raises:
        ModelError: damaged, changed, or of another model.
    """
    METHODS[trained.method].load(model, trained)


def load_into(model: PreTrainedModel, trained: Trained) -> None:
    """Copy what a folder holds into a model that `inject` has prepared for the same method; exact to the bit.

    Raises:
        ModelError: as `load`; or it is of other settings.
    """
    METHODS[trained.method].load_into(model, trained)


@contextmanager
def bare(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model that `load` changed, by whatever method, computes its bare base."""
    with ExitStack() as stack:
        for method in METHODS.values():
            stack.enter_context(method.bare(model))
        yield
