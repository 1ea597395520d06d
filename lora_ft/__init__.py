"""LoRA fine-tuning of causal language models from one YAML file; `lora-ft --help` lists the commands.

The Python API: `inject_lora`, `load_adapter`, `merge`, `unmerge`, and for several adapters on one base `use`, `mixed`.
"""

from typing import TYPE_CHECKING, Any

from lora_ft.core.version import __version__

if TYPE_CHECKING:
    from lora_ft.methods.lora.files import load_adapter
    from lora_ft.methods.lora.inject import inject_lora, merge, unmerge
    from lora_ft.methods.lora.multi import mixed, use

__all__ = ["__version__", "inject_lora", "load_adapter", "merge", "mixed", "unmerge", "use"]

_MODULES = {"inject_lora": "inject", "load_adapter": "files", "merge": "inject", "unmerge": "inject"}
_MODULES |= {"mixed": "multi", "use": "multi"}


def __getattr__(name: str) -> Any:
    """Import a function of the API on first use, so that importing the package does not import torch (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"lora_ft.methods.lora.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
