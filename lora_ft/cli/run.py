"""The run itself."""

import sys
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
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Train in N processes on this machine; else one for each visible GPU, or one."
        ),
    ] = None,
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
    from lora_ft.launch import launch, wanted

    many = wanted(processes, on_gpus=not settings.trainer.get("use_cpu"))
    if many > 1:
        raise SystemExit(launch(many, sys.argv[1:]))
    from lora_ft.train import train

    train(
        settings,
        resume=resume,
        overwrite=overwrite,
        other_base=other_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
