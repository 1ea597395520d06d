"""Commands for what a run has left."""

from pathlib import Path
from typing import Annotated

import typer

from lora_ft import exits
from lora_ft.cli.app import AllowPickle, AsJson, Debug, OtherBase, Set, TrustRemoteCode, command


@command
def eval(
    folder: Annotated[Path, typer.Argument(help="An adapter, a checkpoint or a merged model.")] = Path("out"),
    config: Annotated[Path | None, typer.Option(help="Settings for an adapter without a record of its own.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Other data than the run's eval data.")] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="The base: hub id or folder.")] = None,
    as_json: AsJson = False,
    set: Set = None,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Score an adapter beside its base, or a merged model alone.

    \b
    Example: lora-ft eval out --data reviews-test.jsonl --json
    """
    if config:  # a mistake in it is answered now, with what the command line and the record add left out
        from lora_ft.config import load_config

        load_config(config, ["model.name=stands in", *(["data.eval=1"] if data else []), *(set or [])])
    exits.quiet()
    from lora_ft.evaluate import evaluate_command

    evaluate_command(
        folder,
        config_path=config,
        data=data,
        base=base,
        as_json=as_json,
        overrides=set or [],
        other_base=other_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


@command
def merge(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="The adapter, or a checkpoint.")],
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base, if the record has none or it moved.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The new model's folder; else DIR-merged.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare logits of base + adapter and the merged model.")
    ] = True,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Fold an adapter into its base and prove that the result is the same.

    \b
    Example: lora-ft merge --base gpt2 --adapter out/
    """
    exits.quiet()
    from lora_ft.methods.merge import merge_command

    merge_command(
        adapter,
        base=base,
        output=output,
        verify=verify,
        other_base=other_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
