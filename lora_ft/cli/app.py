"""The app, the options that commands share, and the one place where errors become messages and exit codes."""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from lora_ft.cli.exits import report_error
from lora_ft.cli.streams import open_streams, unwritable, use_utf8
from lora_ft.core.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, ConfigError, FilesError
from lora_ft.core.messages import SafeStream, info, working
from lora_ft.core.ranks import rank
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.terminal import shown_activity
from lora_ft.core.trust import Trust
from lora_ft.core.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich costs a third of the time that --help may take
    context_settings={"help_option_names": ["-h", "--help"]},
)


def complete_setting(incomplete: str) -> list[str]:
    """The settings that start with `incomplete`, for the shell's completion of `--set`."""
    from lora_ft.config.schema import SECTIONS

    names = [f"{section}.{name}=" for section, model in SECTIONS.items() for name in model.model_fields]
    return [name for name in [*names, "output="] if name.startswith(incomplete)]


Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Override a setting of the config. Can be repeated; the last value wins.",
        autocompletion=complete_setting,
    ),
]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
BaseName = Annotated[
    str | None, Option("--base", metavar="NAME", help="The base model: a hub id or folder. Default: the adapter's own.")
]
OtherBase = Annotated[
    bool, Option("--other-base", help="Continue with a warning if the base is not the one the adapter was trained on.")
]
RemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run Python code that comes with the base model.")]
Pickles = Annotated[
    bool, Option("--allow-pickle", help="Load pickled weights if there are no others, by torch's weights_only loader.")
]
PERMISSIONS = {"other_base": OtherBase, "remote_code": RemoteCode, "pickles": Pickles}  # by the fields of Trust
AsJson = Annotated[bool, Option("--json", help="Print one JSON object instead of a table.")]
ConfigFile = Annotated[Path, Argument(metavar="CONFIG", help="The YAML config file.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: register a command that ends with a message and an exit code after any error or signal.

    It gets the option --debug too, and those of PERMISSIONS for a parameter `trust`. Applied inside of Typer, which would
    handle Ctrl-C and closed pipes in its own way.
    """
    parameters = dict(inspect.signature(function).parameters)
    permissions = PERMISSIONS if parameters.pop("trust", None) else {}
    for name, flag in [*permissions.items(), ("debug", Debug)]:
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=flag)

    @functools.wraps(function)
    def run(*, debug: bool, **options: Any) -> None:
        if permissions:
            options["trust"] = Trust(**{name: options.pop(name) for name in permissions})
        try:
            check_surroundings()
            if rank() != 0 and function.__name__ != "train":
                return  # under a launcher only rank 0 runs the commands that need one process
            with Stopper(), shown_activity(), working(f"lora-ft {function.__name__}: working"):
                function(**options)
                sys.stdout.flush()
        except Exception as error:
            raise SystemExit(report_error(error, debug="--debug" in sys.argv)) from None
        except (Stopped, KeyboardInterrupt) as stop:
            info(str(stop) or "stopped")
            raise SystemExit(getattr(stop, "exit_code", EXIT_INTERRUPTED)) from None

    run.__doc__ = (function.__doc__ or "").replace("Example:", "\b\n    Example:", 1)  # \b: keep the lines that follow
    run.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
    return app.command()(run)


def check_surroundings() -> None:
    """Refuse a current folder that was deleted (FilesError), and `python -OO` (ConfigError)."""
    if sys.flags.optimize > 1:
        raise ConfigError(
            "Python runs without docstrings (PYTHONOPTIMIZE=2 or -OO), which transformers needs. Unset PYTHONOPTIMIZE, or "
            "set it to 1."
        )
    try:
        os.getcwd()
    except OSError as e:
        raise FilesError(
            f"the current folder can't be used ({e.strerror}); was it deleted? Change to another: cd ~"
        ) from e


def print_version(requested: bool) -> None:
    """Callback of `--version`."""
    if requested:
        print(f"lora-ft {__version__}")
        raise typer.Exit()


@app.callback()
def lora_ft(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune causal language models with LoRA from one YAML file.

    \b
    lora-ft init --model gpt2 --data reviews.csv    writes config.yaml
    lora-ft train config.yaml                       writes the adapter to out/
    lora-ft eval out                                compares it with the base
    lora-ft generate out                            chats with it
    lora-ft merge --adapter out                     writes a plain model
    """


def main() -> None:
    """Run the command line in sys.argv: the console script, and the entry point of the processes that `train` starts."""
    use_utf8()
    open_streams()
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    try:
        app(prog_name="lora-ft")
    except OSError as error:  # the help, or an error, could not be printed
        raise SystemExit(report_error(error, debug=False)) from None
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich and typer exit with 1 when the pipe is closed
            raise SystemExit(EXIT_BROKEN_PIPE) from None
        raise
    finally:
        unwritable()
