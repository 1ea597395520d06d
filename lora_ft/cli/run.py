"""Commands up to a trained run: init, check, schema, env, train, compare."""

import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lora_ft.cli.app import AsJson, ConfigFile, Pickles, RemoteCode, Set, command, main
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import echo, echo_json, silence_libraries
from lora_ft.core.trust import NO_TRUST, Trust


@command
def init(
    config: Annotated[Path, Argument(metavar="CONFIG", help="The config file to write.")] = Path("config.yaml"),
    model: Annotated[str | None, Option(metavar="NAME", help="The base model: hub id, folder or .gguf file.")] = None,
    data: Annotated[
        list[str] | None,
        Option(metavar="SOURCE", help="A file, folder, pattern or hub id[:config][@split]; repeatable."),
    ] = None,
    eval: Annotated[str | None, Option(metavar="SOURCE", help="Evaluation data. Default: part of the data.")] = None,
    task: Annotated[str | None, Option(help="chat, classification, completion or text. Default: inferred.")] = None,
    output: Annotated[str | None, Option(metavar="FOLDER", help="The folder for the adapter. Default: out.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing config file.")] = False,
    remote_code: RemoteCode = False,
    pickles: Pickles = False,
) -> None:
    """Write a config for a model and data; prompt for the rest.

    Example: lora-ft init --model models/smollm2-135m-instruct \\
                 --data data/reviews_train.jsonl
    """
    silence_libraries()
    from lora_ft.commands.init.command import create_config

    create_config(config, model, data, task, output, overwrite, eval, Trust(remote_code, pickles))


@command
def check(
    config: Annotated[
        list[Path] | None, Argument(metavar="CONFIG...", help="The config file, or several; none with --shape.")
    ] = None,
    set: Set = None,
    shape: Annotated[
        str | None, Option(metavar="SHAPE", help="Only print sizes of gpt2, gpt3-175b, ... or a folder's config.json.")
    ] = None,
    time: Annotated[bool, Option("--time", help="Load the model and time two steps to estimate the duration.")] = False,
    as_json: AsJson = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Check config, data, targets and memory without training.

    Example: lora-ft check config.yaml --time
             lora-ft check --shape gpt3-175b --set adapter.rank=4
    """
    from lora_ft.config.load import load_configs, parse_config

    if (not config) == (shape is None):
        raise ConfigError("give either a CONFIG file or --shape with a name or a folder that has a config.json")
    if shape is not None:
        without_data = {"model": {"name": shape}, "data": {"train": "none", "text": "{text}"}}
        settings = parse_config(without_data, set or (), "the command line")
        silence_libraries()
        from lora_ft.commands.check.shapes import check_shape

        check_shape(shape, settings, as_json=as_json, trust=trust)
        return
    configs = load_configs(config or (), set or ())
    silence_libraries()
    if len(configs) == 1:
        from lora_ft.commands.check.command import check

        check(*configs.values(), as_json=as_json, time=time, trust=trust)
    elif time:
        raise ConfigError("--time measures one config")
    else:
        from lora_ft.commands.check.several import check_several

        check_several(configs, as_json=as_json, trust=trust)


@command
def schema(
    markdown: Annotated[bool, Option("--markdown", help="Print the reference page of all settings instead.")] = False,
) -> None:
    """Print the JSON Schema of the config, for completion in editors.

    Example: lora-ft schema > lora-ft.schema.json
    """
    from lora_ft.config.docs import reference, schema_text

    sys.stdout.write(reference() if markdown else schema_text())


@command
def env(as_json: AsJson = False) -> None:
    """Print versions, device and memory for a bug report.

    Example: lora-ft env > env.txt
    """
    from lora_ft.commands.env import environment, report

    echo_json(environment()) if as_json else echo(report())


@command
def train(
    config: Annotated[list[Path], Argument(metavar="CONFIG...", help="The YAML config file, or several.")],
    set: Set = None,
    resume: Annotated[bool, Option("--resume", help="Resume from the newest checkpoint, if there is one.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in `output`.")] = False,
    until: Annotated[
        float | None,
        Option(metavar="N", help="Stop after step N, or below 1 after this part of the run, to be resumed."),
    ] = None,
    processes: Annotated[
        int | None, Option(metavar="N", min=1, help="Train in N local processes. Default: one per visible GPU.")
    ] = None,
    trust: Trust = NO_TRUST,
) -> None:
    """Train an adapter and write it to the config's `output`.

    Several configs of one base are trained together: a step of each at a time.

    Example: lora-ft train config.yaml --set train.learning_rate=1e-4
    """
    from lora_ft.config.load import load_configs

    if resume and overwrite:
        raise ConfigError("--resume continues the run, --overwrite replaces it: they cannot be combined")
    if until is not None and (not 0 < until < math.inf or until >= 1 and until != int(until)):
        raise ConfigError("--until: below 1 it is a part of the run (0.25), from 1 a number of steps, an integer (100)")
    configs = load_configs(config, set or ())
    silence_libraries()
    from lora_ft.distributed.launch import launch, processes_to_start

    settings = next(iter(configs.values()))
    if (count := processes_to_start(processes, on_gpus=not settings.trainer.use_cpu)) > 1:
        raise SystemExit(launch(count, sys.argv[1:], main))
    with redirect_stdout(sys.stderr):  # transformers announces W&B's offline mode on stdout
        if len(configs) > 1:
            from lora_ft.commands.train import train_together
        else:
            from lora_ft.commands.train import train

    if len(configs) > 1:
        train_together(configs, resume=resume, overwrite=overwrite, until=until, trust=trust)
    else:
        train(settings, resume=resume, overwrite=overwrite, until=until, trust=trust)


@command
def compare(
    config: ConfigFile,
    vary: Annotated[
        list[str] | None, Option(metavar="KEY=V1,V2,...", help="Train with each value. Repeat it for all combinations.")
    ] = None,
    seeds: Annotated[str, Option(metavar="N,N,...", help="Train each variant with these seeds.")] = "0",
    tune: Annotated[
        list[str] | None, Option(metavar="KEY=V1,V2,...", help="Choose each variant's best, on rows held out of train.")
    ] = None,
    tune_steps: Annotated[
        int | None, Option(metavar="N", min=1, help="Steps of a tuning run. Default: those of a full run.")
    ] = None,
    set: Set = None,
    output: Annotated[
        Path | None, Option(metavar="DIR", help="The folder for all runs. Default: the config's output with -compare.")
    ] = None,
    one_by_one: Annotated[
        bool, Option("--one-by-one", help="Train each run alone, to measure its time and memory; slower.")
    ] = False,
    as_json: AsJson = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Train variants of a config and compare the results.

    The same command resumes a comparison that was stopped.

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
        one_by_one=one_by_one,
        as_json=as_json,
        trust=trust,
    )
