"""Commands for before a run: nothing is spent yet."""

import sys
from typing import Annotated

import typer

from lora_ft import exits
from lora_ft.cli.app import AllowPickle, AsJson, ConfigFile, Debug, Set, TrustRemoteCode, command


@command
def check(
    config: ConfigFile,
    set: Set = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Everything short of training: config, rows, targets, memory.

    \b
    Example: lora-ft check configs/quickstart.yaml
    """
    from lora_ft.config import load_config

    settings = load_config(config, set or ())
    exits.quiet()
    from lora_ft.check import check

    check(settings, as_json=as_json, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)


@command
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference page instead: every setting in words.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of a config, for completion in editors.

    \b
    Example: lora-ft schema > lora-ft.schema.json
    """
    from lora_ft.json_schema import reference, schema_text

    sys.stdout.write(reference() if markdown else schema_text())


@command
def env(as_json: AsJson = False, debug: Debug = False) -> None:
    """Print versions, device and memory, for a bug report.

    \b
    Example: lora-ft env > env.txt
    """
    from lora_ft import environment

    if as_json:
        import json

        print(json.dumps(environment.environment()))
    else:
        sys.stdout.write(environment.report())
