"""The command line's frame: the app, the options that commands share, and how a command ends.

Every error is answered once, in `command`: a user's with its message and exit code, anything else as a bug in one line.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_ft.cli.exits import report_error
from lora_ft.core.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from lora_ft.core.messages import info
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich costs a third of the time that --help may take
    context_settings={"help_option_names": ["-h", "--help"]},
)


def settings_like(incomplete: str) -> list[str]:
    """The settings that begin so, for the shell's completion of `--set`."""
    from lora_ft.config.schema import SECTIONS

    names = [f"{section}.{name}=" for section, model in SECTIONS.items() for name in model.model_fields]
    return [name for name in [*names, "output="] if name.startswith(incomplete)]


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Set one setting of the config; again for more, the last wins.",
        autocompletion=settings_like,
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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors are answered (inside of Typer, which has other ideas about Ctrl-C and pipes)."""

    @functools.wraps(function)
    def answered(*args: Any, **options: Any) -> None:
        if function.__name__ != "train" and os.environ.get("RANK", "0") != "0":
            return  # a launcher started several of what one process does
        try:
            with Stopper():
                function(*args, **options)
                sys.stdout.flush()
        except Exception as error:
            raise SystemExit(report_error(error, debug="--debug" in sys.argv)) from None
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich's own report_error to a closed pipe is 1
                raise SystemExit(EXIT_BROKEN_PIPE) from None
            raise
        except (Stopped, KeyboardInterrupt) as stop:
            info(str(stop) or "stopped")
            raise SystemExit(getattr(stop, "exit_code", EXIT_INTERRUPTED)) from None

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


def main() -> None:
    """Run the command line in sys.argv: the console script, and the entry point of the processes that `train` starts."""
    for stream in (sys.stdout, sys.stderr):  # printing never fails because of a character
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    app(prog_name="lora-ft")
