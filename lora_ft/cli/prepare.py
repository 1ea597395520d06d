"""Commands for before a run: nothing is spent yet."""

from pathlib import Path
from typing import Annotated

import typer

from lora_ft import exits
from lora_ft.cli.app import AllowPickle, AsJson, Debug, OtherBase, Set, TrustRemoteCode, command


@command
def check(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The YAML file; none with --shape.")] = None,
    set: Set = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Only sizes: of gpt2, gpt3-175b, ... or a folder with a config.json."),
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Load the model, time two steps, estimate the duration.")
    ] = False,
    as_json: AsJson = False,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Everything short of training: config, rows, targets, memory.

    \b
    Example: lora-ft check configs/quickstart.yaml --time
    Example: lora-ft check --shape gpt3-175b --set adapter.rank=4
    """
    from lora_ft.config import load_config, parse_config
    from lora_ft.errors import ConfigError

    if (config is None) == (shape is None):
        raise ConfigError("give either a CONFIG file, or --shape with a name or a folder that has a config.json")
    if shape:
        nothing = {"model": {"name": shape}, "data": {"train": "none", "text": "{text}"}}
        settings = parse_config(nothing, set or (), "the command line")
        exits.quiet()
        from lora_ft.shapes import check_shape

        check_shape(shape, settings, as_json=as_json, trust_remote_code=trust_remote_code)
        return
    assert config is not None
    settings = load_config(config, set or ())
    exits.quiet()
    from lora_ft.check import check

    check(
        settings,
        as_json=as_json,
        time=time,
        other_base=other_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
