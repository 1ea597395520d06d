"""The run itself."""

from typing import Annotated

import typer

from lora_ft import exits
from lora_ft.cli.app import AllowPickle, ConfigFile, Debug, OtherBase, Set, TrustRemoteCode, command


@command
def train(
    config: ConfigFile,
    set: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, or begin.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that `output` holds.")] = False,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Train an adapter and write it to the config's `output`.

    \b
    Example: lora-ft train configs/quickstart.yaml --set train.learning_rate=1e-4
    """
    from lora_ft.config import load_config
    from lora_ft.errors import ConfigError

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite: give one; --resume goes on, --overwrite begins anew")
    settings = load_config(config, set or ())
    exits.quiet()
    from lora_ft.train import train

    train(
        settings,
        resume=resume,
        overwrite=overwrite,
        other_base=other_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
