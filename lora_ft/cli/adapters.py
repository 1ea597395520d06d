"""Commands on adapters' files: inspect, combine, compress."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lora_ft.cli.app import AsJson, BaseName, command
from lora_ft.core.errors import ConfigError


@command
def inspect(
    folders: Annotated[list[Path], Argument(metavar="A [B]", help="An adapter, or two to be compared.")],
    base: BaseName = None,
    intruders: Annotated[
        bool, Option("--intruders", help="Count intruder dimensions; takes the singular vectors of every weight.")
    ] = False,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="Also write a page, with a map of layers and roles.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look into an adapter: its health, change and ranks.

    Without loading a model. The exit code is 4 if it finds a problem.

    Example: lora-ft inspect out
    """
    if len(folders) > 2:
        raise ConfigError("inspect: give one adapter, or two to be compared")
    from lora_ft.commands.inspect.command import inspect_command

    inspect_command(folders, base=base, intruders=intruders, html=html, as_json=as_json)
