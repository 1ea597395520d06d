"""The commands. Thin: a config is read and validated here, and only then is torch imported, inside the command.

Every error is answered once, in `command`: a user's with its message and exit code, anything else as a bug in one line.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_ft import __version__
from lora_ft.exits import INTERRUPTED, answer, quiet, say
from lora_ft.signals import Stopped, Stopper

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich costs a third of the time that --help may take
    context_settings={"help_option_names": ["-h", "--help"]},
)

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.PATH=VALUE", help="Set one setting of the config; again for more, the last wins."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
OtherBase = Annotated[
    bool, typer.Option("--other-base", help="Go on, loudly, though the base is not the one the adapter was trained on.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the base, if it asks for that.")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read a base that has only pickled weights, with torch's weights_only loader."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.")]


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):  # a user's text is never the reason why printing fails
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    app(prog_name="lora-ft")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors are answered (inside of Typer, which has other ideas about Ctrl-C and pipes)."""

    @functools.wraps(function)
    def answered(*args: Any, **options: Any) -> None:
        try:
            with Stopper():
                function(*args, **options)
                sys.stdout.flush()
        except Exception as error:
            raise SystemExit(answer(error, debug="--debug" in sys.argv)) from None
        except (Stopped, KeyboardInterrupt) as stop:
            say(str(stop) or "stopped")
            raise SystemExit(getattr(stop, "exit_code", INTERRUPTED)) from None

    return app.command()(answered)


def print_version(asked: bool) -> None:
    if asked:
        print(f"lora-ft {__version__}")
        raise typer.Exit()


@app.callback()
def lora_ft(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune causal language models with LoRA from one YAML file.

    \b
    lora-ft train configs/quickstart.yaml      the adapter lands in out/
    lora-ft eval                               base against adapter
    lora-ft merge --adapter out                a plain model in out-merged/
    """


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
    quiet()
    from lora_ft.train import train

    train(
        settings,
        resume=resume,
        overwrite=overwrite,
        other_base=other_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


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
    quiet()
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
    quiet()
    from lora_ft.adapter.merge import merge_command

    merge_command(
        adapter,
        base=base,
        output=output,
        verify=verify,
        other_base=other_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


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
    quiet()
    from lora_ft.check import check

    check(settings, as_json=as_json, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
