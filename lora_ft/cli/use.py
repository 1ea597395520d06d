"""Commands that use a run's output: eval, generate, serve, merge, export, report."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from lora_ft.cli.app import AsJson, BaseName, Set, command
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import silence_libraries
from lora_ft.core.trust import NO_TRUST, Trust

Verify = Annotated[
    bool, Option("--verify/--no-verify", help="Compare a merged model's logits with those of base + adapter.")
]
Served = Annotated[
    list[Path] | None, Argument(metavar="FOLDER", help="Adapters of one base, or a complete model. Default: out.")
]


@command
def eval(
    folders: Annotated[
        list[Path] | None,
        Argument(metavar="FOLDER", help="Adapters of one base, a checkpoint or a merged model. Default: out."),
    ] = None,
    config: Annotated[Path | None, Option(help="The config, if the adapter has no lora_ft.json.")] = None,
    data: Annotated[str | None, Option(metavar="SOURCE", help="Data. Default: the run's eval data.")] = None,
    base: BaseName = None,
    as_json: AsJson = False,
    texts: Annotated[
        Path | None, Option(metavar="FILE", help="Write the texts generated for generation.metrics as JSON lines.")
    ] = None,
    again: Annotated[
        bool, Option("--again", help="Compute scores that the run's record or the cache holds once more.")
    ] = False,
    set: Set = None,
    trust: Trust = NO_TRUST,
) -> None:
    """Score adapters and their base, or a merged model.

    Example: lora-ft eval out --data data/reviews_eval.jsonl --json
    """
    if config:  # report its errors before torch is imported; the record provides the rest of it later
        from lora_ft.config.load import NOT_TRAINING, load_config

        load_config(config, [*NOT_TRAINING, "model.name=unknown", *(["data.eval=1"] if data else []), *(set or [])])
    silence_libraries()
    from lora_ft.commands.evaluate import evaluate_command

    evaluate_command(
        folders or [Path("out")],
        config_path=config,
        data=data,
        base=base,
        as_json=as_json,
        texts_path=texts,
        again=again,
        overrides=set or [],
        trust=trust,
    )


@command
def generate(
    folders: Served = None,
    adapter: Annotated[
        list[str] | None, Option(metavar="NAME=DIR", help="An adapter and its name; repeatable, the first is active.")
    ] = None,
    base: BaseName = None,
    prompt: Annotated[str | None, Option(metavar="TEXT", help="A prompt, put into the run's template.")] = None,
    column: Annotated[
        list[str] | None, Option(metavar="NAME=TEXT", help="Another column of the run's template; repeatable.")
    ] = None,
    prompts: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="A file of prompts: rows with the template's columns, `messages` or `prompt`, optionally `adapter`; or .txt.",
        ),
    ] = None,
    raw: Annotated[bool, Option("--raw", help="Use prompts as they are, without the template.")] = False,
    max_new_tokens: Annotated[int | None, Option(min=1, help="The most tokens per answer. Default: 256.")] = None,
    temperature: Annotated[
        float | None, Option(min=0.001, help="Sampling temperature. Default: the model's generation config.")
    ] = None,
    top_p: Annotated[float | None, Option(min=0.0, max=1.0, help="Nucleus sampling with this probability.")] = None,
    top_k: Annotated[int | None, Option(metavar="K", min=1, help="Sample from the K most likely tokens.")] = None,
    greedy: Annotated[bool, Option("--greedy", help="Always choose the most likely token.")] = False,
    seed: Annotated[int | None, Option(min=0, max=2**64 - 1, help="Sampling seed.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Rows of --prompts per batch, across adapters.")] = 16,
    as_json: Annotated[bool, Option("--json", help="Print each answer as a JSON object on a line.")] = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Answer prompts or chat, with adapters that share one base.

    With --base and no adapter, the base model itself answers.

    Example: lora-ft generate out --prompt "The best film of the year"
             lora-ft generate --adapter reviews=out --prompts data/reviews_eval.jsonl
    """
    silence_libraries()
    from lora_ft.commands.generate.command import generate_command

    generate_command(
        folders or [],
        adapters=adapter or [],
        base=base,
        prompt=prompt,
        prompts=prompts,
        columns=column or (),
        raw=raw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy=greedy,
        seed=seed,
        batch_size=batch_size,
        as_json=as_json,
        trust=trust,
    )


@command
def serve(
    folders: Served = None,
    adapter: Annotated[
        list[str] | None, Option(metavar="NAME=DIR", help="An adapter and its name for requests; repeatable.")
    ] = None,
    base: BaseName = None,
    host: Annotated[str, Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="The port; 0 chooses a free one.")] = 8000,
    api_key_file: Annotated[Path | None, Option(metavar="FILE", help="Keys, one a line; a request needs one.")] = None,
    insecure: Annotated[bool, Option("--insecure", help="Serve other machines without a key.")] = False,
    adapters_folder: Annotated[
        Path | None, Option(metavar="DIR", help="Let requests load adapters from below this folder.")
    ] = None,
    rows: Annotated[int, Option(min=1, help="Answers that are computed at once.")] = 16,
    cache_tokens: Annotated[int, Option(min=256, help="Tokens whose keys and values memory may hold.")] = 16_384,
    queue: Annotated[int, Option(min=1, help="Requests that may wait; others get status 429.")] = 64,
    timeout: Annotated[float, Option(min=1, help="Seconds that a request may take.")] = 600,
    trust: Trust = NO_TRUST,
) -> None:
    """Serve adapters of one base behind OpenAI's API.

    Example: lora-ft serve --adapter reviews=out
    """
    silence_libraries()
    from lora_ft.commands.serve.command import Limits, serve_command

    serve_command(
        folders or [],
        adapters=adapter or [],
        base=base,
        host=host,
        port=port,
        api_key_file=api_key_file,
        insecure=insecure,
        adapters_folder=adapters_folder,
        limits=Limits(rows, cache_tokens, queue),
        seconds=timeout,
        trust=trust,
    )


@command
def merge(
    folder: Annotated[Path | None, Argument(metavar="FOLDER", help="The adapter or checkpoint. Default: out.")] = None,
    adapter: Annotated[Path | None, Option(metavar="DIR", help="The same, as an option.")] = None,
    base: BaseName = None,
    onto: Annotated[
        Literal["quantized", "original"] | None,
        Option(help="For a base that was quantized: merge onto those weights, or the original ones. Default: by loss."),
    ] = None,
    output: Annotated[
        Path | None, Option(metavar="DIR", help="The merged model's folder. Default: FOLDER-merged.")
    ] = None,
    verify: Verify = True,
    trust: Trust = NO_TRUST,
) -> None:
    """Merge an adapter into its base and verify the result.

    Example: lora-ft merge --adapter out
    """
    if folder and adapter:
        raise ConfigError("FOLDER and --adapter: give only one")
    silence_libraries()
    from lora_ft.commands.merge import merge_command

    merge_command(folder or adapter or Path("out"), base=base, onto=onto, output=output, verify=verify, trust=trust)


@command
def export(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="An adapter or checkpoint; for gguf also a merged model.")],
    to: Annotated[
        Literal["peft", "merged", "gguf"],
        Option(help="The common subset of PEFT's format, a merged model, or a file for llama.cpp."),
    ],
    merged: Annotated[bool, Option("--merged", help="gguf: write the merged model, not the adapter alone.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(help="gguf: the matrices' dtype. auto: float32 for an adapter, as stored for a model."),
    ] = "auto",
    output: Annotated[Path | None, Option(metavar="PATH", help="Where to write. Default: beside FOLDER.")] = None,
    base: BaseName = None,
    verify: Verify = True,
    push: Annotated[str | None, Option(metavar="REPO", help="Upload the result to this hub repository.")] = None,
    public: Annotated[bool, Option("--public", help="Create the repository as public. Default: private.")] = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Convert an adapter for PEFT, vLLM or llama.cpp, or upload it.

    Example: lora-ft export out --to gguf
    """
    silence_libraries()
    from lora_ft.commands.export.command import export_command

    export_command(
        folder,
        to,
        output=output,
        base=base,
        merged=merged,
        dtype=dtype,
        verify=verify,
        push=push,
        public=public,
        trust=trust,
    )


@command
def report(
    folders: Annotated[
        list[Path] | None, Argument(metavar="OUT", help="Output folders of runs, finished or not. Default: out.")
    ] = None,
    output: Annotated[
        Path | None, Option(metavar="FILE", help="Default: OUT/report.html, or compare-report.html for several runs.")
    ] = None,
) -> None:
    """Regenerate a run's report.html, or compare runs on one page.

    Example: lora-ft report out
    """
    from lora_ft.report.write import report_command

    report_command(folders or [Path("out")], output)
