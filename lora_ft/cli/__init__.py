"""The command line. Importing this package registers the commands, in the order in which `--help` lists them.

A command reads and validates its config first, and only then imports torch.
"""

from lora_ft.cli import run, use, adapters  # noqa: I001 (the order of `--help`)
from lora_ft.cli.app import main

__all__ = ["adapters", "main", "run", "use"]
