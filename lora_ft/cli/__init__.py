"""The commands, in the order of a user's work. Thin: a config is read and validated first, and only then is torch imported,
inside the command.
"""

import sys

from lora_ft.cli import prepare, run, use
from lora_ft.cli.app import app

__all__ = ["main", "prepare", "run", "use"]


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):  # a user's text is never the reason why printing fails
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    app(prog_name="lora-ft")
