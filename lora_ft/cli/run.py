"""Commands that train: train, compare."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

from typer import Option

from lora_ft.cli.app import AsJson, ConfigFile, Pickles, RemoteCode, Set, command, main
from lora_ft.core.messages import silence_libraries
from lora_ft.core.trust import NO_TRUST, Trust


@command
def train(
    config: ConfigFile,
    set: Set = None,
    resume: Annotated[bool, Option("--resume", help="Resume from the newest checkpoint, if there is one.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in `output`.")] = False,
    processes: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Train in N processes on this machine. Default: one per visible GPU."),
    ] = None,
    trust: Trust = NO_TRUST,
) -> None:
    """Train an adapter and write it to the config's `output`.

    \b
    Example: lora-ft train configs/quickstart.yaml --set train.learning_rate=1e-4
    """
    from lora_ft.config.load import load_config
    from lora_ft.core.errors import ConfigError

    if resume and overwrite:
        raise ConfigError("--resume continues the run, --overwrite replaces it: they cannot be combined")
    settings = load_config(config, set or ())
    silence_libraries()
    from lora_ft.distributed.launch import launch, processes_to_start

    count = processes_to_start(processes, on_gpus=not settings.trainer.use_cpu)
    if count > 1:
        raise SystemExit(launch(count, sys.argv[1:], main))
    with redirect_stdout(sys.stderr):  # transformers announces W&B's offline mode on stdout
        from lora_ft.commands.train import train

    train(settings, resume=resume, overwrite=overwrite, trust=trust)


@command
def compare(
    config: ConfigFile,
    vary: Annotated[
        list[str] | None,
        Option(metavar="KEY=V1,V2,...", help="Train with each of these values. Repeat it for all combinations."),
    ] = None,
    seeds: Annotated[str, Option(metavar="N,N,...", help="Train each variant with these seeds.")] = "0",
    tune: Annotated[
        list[str] | None,
        Option(metavar="KEY=V1,V2,...", help="Choose the best value per variant, on rows held out of train."),
    ] = None,
    tune_steps: Annotated[
        int | None, Option(metavar="N", min=1, help="Steps of a tuning run. Default: those of a full run.")
    ] = None,
    set: Set = None,
    output: Annotated[
        Path | None, Option(metavar="DIR", help="The folder for all runs. Default: the config's output with -compare.")
    ] = None,
    as_json: AsJson = False,
    remote_code: RemoteCode = False,
    pickles: Pickles = False,
) -> None:
    """Train variants of a config and compare the results.

    The same command resumes a comparison that was stopped.

    \b
    Example: lora-ft compare config.yaml --vary adapter.rank=1,4,16 --seeds 0,1
             lora-ft compare config.yaml --vary adapter.method=lora,full \\
                 --tune train.learning_rate=1e-4,1e-3
    """
    from lora_ft.commands.compare.command import compare_command

    compare_command(
        config,
        vary=vary or (),
        seeds=seeds,
        tune=tune or (),
        tune_steps=tune_steps,
        output=output,
        overrides=set or (),
        as_json=as_json,
        trust=Trust(remote_code, pickles),
    )
