"""Commands before a run: init, check, schema, env."""

import json
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lora_ft.cli.app import AsJson, Set, command
from lora_ft.core.messages import silence_libraries
from lora_ft.core.trust import NO_TRUST, Trust


@command
def init(
    config: Annotated[Path, Argument(metavar="[CONFIG]", help="The config file to write.")] = Path("config.yaml"),
    model: Annotated[str | None, Option(metavar="NAME", help="The base model: hub id, folder or .gguf file.")] = None,
    data: Annotated[str | None, Option(metavar="SOURCE", help="The data: a file or hub id[:config][@split].")] = None,
    task: Annotated[str | None, Option(help="chat, classification, completion or text. Default: inferred.")] = None,
    output: Annotated[str | None, Option(metavar="FOLDER", help="The folder for the adapter. Default: out.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing config file.")] = False,
) -> None:
    """Write a config for a model and data; prompt for the rest.

    \b
    Example: lora-ft init --model gpt2 --data reviews.csv
    """
    from lora_ft.commands.init.command import create_config

    create_config(config, model, data, task, output, overwrite)


@command
def check(
    config: Annotated[Path | None, Argument(metavar="CONFIG", help="The config file; omit it with --shape.")] = None,
    set: Set = None,
    shape: Annotated[
        str | None,
        Option(metavar="SHAPE", help="Print sizes only, of gpt2, gpt3-175b, ... or a folder with a config.json."),
    ] = None,
    time: Annotated[bool, Option("--time", help="Load the model and time two steps to estimate the duration.")] = False,
    as_json: AsJson = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Check config, data, targets and memory without training.

    \b
    Example: lora-ft check configs/quickstart.yaml --time
    Example: lora-ft check --shape gpt3-175b --set adapter.rank=4
    """
    from lora_ft.config.load import load_config, parse_config
    from lora_ft.core.errors import ConfigError

    if (config is None) == (shape is None):
        raise ConfigError("give either a CONFIG file or --shape with a name or a folder that has a config.json")
    if shape:
        without_data = {"model": {"name": shape}, "data": {"train": "none", "text": "{text}"}}
        settings = parse_config(without_data, set or (), "the command line")
        silence_libraries()
        from lora_ft.commands.check.shapes import check_shape

        return check_shape(shape, settings, as_json=as_json, trust=trust)
    assert config is not None
    settings = load_config(config, set or ())
    silence_libraries()
    from lora_ft.commands.check.command import check

    check(settings, as_json=as_json, time=time, trust=trust)


@command
def schema(
    markdown: Annotated[bool, Option("--markdown", help="Print the reference page of all settings instead.")] = False,
) -> None:
    """Print the JSON Schema of the config, for completion in editors.

    \b
    Example: lora-ft schema > lora-ft.schema.json
    """
    from lora_ft.config.docs import reference, schema_text

    sys.stdout.write(reference() if markdown else schema_text())


@command
def env(as_json: AsJson = False) -> None:
    """Print versions, device and memory for a bug report.

    \b
    Example: lora-ft env > env.txt
    """
    from lora_ft.commands.env import environment, report

    print(json.dumps(environment()) if as_json else report())
