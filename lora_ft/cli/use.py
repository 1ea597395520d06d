"""Commands for what a run has left."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_ft.cli.app import AllowPickle, AsJson, Debug, OtherBase, Set, TrustRemoteCode, command
from lora_ft.core.messages import silence_libraries
from lora_ft.core.trust import Trust


@command
def eval(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...", help="An adapter, a checkpoint or a merged model; or adapters of one base."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings for an adapter without a record of its own.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Other data than the run's eval data.")] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="The base: hub id or folder.")] = None,
    as_json: AsJson = False,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was generated for generation.metrics, as JSON lines."),
    ] = None,
    set: Set = None,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Score an adapter or several beside their base, or a merged model alone.

    \b
    Example: lora-ft eval out --data reviews-test.jsonl --json
    """
    if config:  # a mistake in it is answered now, with what the command line and the record add left out
        from lora_ft.config.load import NOT_TRAINING, load_config

        load_config(config, [*NOT_TRAINING, "model.name=stands in", *(["data.eval=1"] if data else []), *(set or [])])
    silence_libraries()
    from lora_ft.commands.evaluate import evaluate_command

    evaluate_command(
        folders or [Path("out")],
        config_path=config,
        data=data,
        base=base,
        as_json=as_json,
        texts_path=texts,
        overrides=set or [],
        trust=Trust(trust_remote_code, allow_pickle, other_base),
    )


@command
def generate(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Adapters of one base, or a whole model; else out."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter by a name; again for more. The first answers first."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base: hub id or folder. Alone: without adapters.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this, through the run's own template.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Answer each row: the template's columns, `messages` or `prompt`, and maybe `adapter`; or .txt lines.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Texts are prompts as they are, through no template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most; else 256.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.001, help="Sample; else as the model's own config.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this share.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many tokens.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of --prompts at a time, whatever their adapters.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each answer.")] = False,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt or a file of prompts, or chat; adapters share one base.

    \b
    Example: lora-ft generate out --prompt "The best film of the year"
             lora-ft generate --adapter a=out/a --adapter b=out/b --prompts p.jsonl
    """
    silence_libraries()
    from lora_ft.commands.generate.command import generate_command

    generate_command(
        folders or [],
        adapters=adapter or [],
        base=base,
        prompt=prompt,
        prompts=prompts,
        raw=raw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy=greedy,
        seed=seed,
        batch_size=batch_size,
        as_json=as_json,
        trust=Trust(trust_remote_code, allow_pickle, other_base),
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
    silence_libraries()
    from lora_ft.commands.merge import merge_command

    merge_command(
        adapter,
        base=base,
        output=output,
        verify=verify,
        trust=Trust(trust_remote_code, allow_pickle, other_base),
    )


class Form(StrEnum):
    """What an export makes."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"


class Dtype(StrEnum):
    """How a GGUF's matrices are stored."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@command
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An adapter, a checkpoint; for a GGUF also a merged model.")
    ],
    to: Annotated[
        Form, typer.Option(help="The part of PEFT's format that all read; a merged model; a file for llama.cpp.")
    ],
    merged: Annotated[
        bool, typer.Option("--merged", help="gguf: base and adapter in one, not the adapter alone.")
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="gguf: of the matrices; auto: an adapter float32, a model as stored.")
    ] = Dtype.auto,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Where; else beside FOLDER, by its name.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base, if the record has none or it moved.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare the logits of a whole model.")] = True,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Then upload it to this hub repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; else private.")] = False,
    other_base: OtherBase = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Write an adapter as PEFT, vLLM or llama.cpp load it, or push it.

    \b
    Example: lora-ft export out --to gguf
    """
    silence_libraries()
    from lora_ft.commands.export.command import export_command

    export_command(
        folder,
        str(to),
        output=output,
        base=base,
        merged=merged,
        dtype=str(dtype),
        verify=verify,
        push=push,
        public=public,
        trust=Trust(trust_remote_code, allow_pickle, other_base),
    )


@command
def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[OUT ...]", help="Outputs of runs, finished or not; else out.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; else OUT/report.html, or compare-report.html for several."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make report.html anew from a run's files, or compare several runs on one page.

    \b
    Example: lora-ft report out/rank8 out/rank16
    """
    from lora_ft.report.write import report_command

    report_command(folders or [Path("out")], output)
