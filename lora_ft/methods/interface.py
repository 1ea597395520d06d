"""The methods by name: METHODS[name] is a module with four functions, described here. Only this module knows all methods.

What trains is what has requires_grad after `inject` (`trainable` in methods/lora/inject.py). CONTRIBUTING.md lists where a new
method adds its name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import AdapterConfig
from lora_ft.methods import bottleneck, full, prompt
from lora_ft.methods.lora import method as lora
from lora_ft.methods.prompt import virtual_ids
from lora_ft.methods.trained import Saved, Trained
from lora_ft.nn import adapted

__all__ = ["METHODS", "bare", "virtual_ids"]


class Method(Protocol):
    """The functions of a method's module."""

    def inject(
        self, model: PreTrainedModel, settings: AdapterConfig, seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> str:
        """Prepare a bare base for training, in place: only what trains has requires_grad. Returns a text ("60 modules").

        model: on any device; also meta, to see whether it can be done. seed: for the initial values of added parameters.
        tokenizer: the base's, for the prompt's initial text. ConfigError or ModelError if it does not fit the architecture.
        """

    def save(self, model: PreTrainedModel, folder: Path, base_name: str, tokenizer: PreTrainedTokenizerBase) -> Saved:
        """Write what was trained into an existing folder. PEFT's config names the base as `base_name` does."""

    def load(self, model: PreTrainedModel, trained: Trained) -> None:
        """Put what was trained on a bare base, for inference; ModelError if a file is damaged, or of another model."""

    def load_into(self, model: PreTrainedModel, trained: Trained) -> None:
        """Copy what was trained into a model that `inject` has prepared for the same method, exact to the bit.

        ModelError if a file is damaged, of another model, or of other settings.
        """


METHODS: dict[str, Method] = {"lora": lora, "full": full, "bottleneck": bottleneck, "prompt": prompt}


@contextmanager
def bare(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model computes its bare base, whichever method trained it (virtual tokens are left out of the input instead).

    A base that full fine-tuning changes in training is not kept: there this does nothing.
    """
    with adapted.bare(model), full.base_weights(model):
        yield
