"""Commands on adapters' files: inspect, combine, compress."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from lora_ft.cli.app import AsJson, BaseName, command
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import silence_libraries
from lora_ft.core.trust import NO_TRUST, Trust

Rank = Annotated[int | None, Option(min=1, help="The rank of the result. Default: the largest of the adapters.")]


@command
def inspect(
    folders: Annotated[list[Path], Argument(metavar="A [B]", help="An adapter, or two to be compared.")],
    base: BaseName = None,
    intruders: Annotated[
        bool, Option("--intruders", help="Count intruder dimensions; takes the singular vectors of every weight.")
    ] = False,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="Also write a page, with a map of layers and roles.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look into an adapter: its health, change and ranks.

    Without loading a model. The exit code is 4 if it finds a problem.

    Example: lora-ft inspect out
    """
    if len(folders) > 2:
        raise ConfigError("inspect: give one adapter, or two to be compared")
    from lora_ft.commands.inspect.command import inspect_command

    inspect_command(folders, base=base, intruders=intruders, html=html, as_json=as_json)


@command
def combine(
    parts: Annotated[list[str], Argument(metavar="FOLDER=WEIGHT", help="Adapters of one base, and their weights.")],
    out: Annotated[Path, Option(metavar="DIR", help="Where to write the result.")],
    how: Annotated[
        Literal["linear", "cat", "svd", "ties", "dare"],
        Option(
            help="cat is exact, at the sum of the ranks; svd the nearest of a rank; linear the same at a rank that all have; "
            "ties and dare keep a part of the entries."
        ),
    ] = "cat",
    rank: Rank = None,
    density: Annotated[
        float | None, Option(min=0.001, max=1.0, help="The share of entries that ties and dare keep. Default: 0.2.")
    ] = None,
    seed: Annotated[int | None, Option(min=0, help="Of the entries that dare draws. Default: 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add up adapters of one base, with weights.

    Their ranks, scalings and modules may differ. Tells the error against the
    exact sum.

    Example: lora-ft combine out/a=0.7 out/b=0.3 --out out/both
             lora-ft combine out/a=1 out/b=-0.5 --out out/less --how svd
    """
    for option, given, ways in (("--density", density, ("ties", "dare")), ("--seed", seed, ("dare",))):
        if given is not None and how not in ways:
            raise ConfigError(f"{option} goes with --how {' or '.join(ways)}; this is --how {how}")
    silence_libraries()
    from lora_ft.commands.combine import combine_command
    from lora_ft.methods.lora.combine import Settings

    settings = Settings(how, rank, density=0.2 if density is None else density, seed=seed or 0)
    combine_command(parts, out, settings, as_json=as_json)


@command
def compress(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The adapter or checkpoint.")],
    out: Annotated[Path | None, Option(metavar="DIR", help="Where to write the result. Default: FOLDER-small.")] = None,
    rank: Annotated[int | None, Option(min=1, help="The rank of the result.")] = None,
    energy: Annotated[
        float | None,
        Option(min=0.01, max=1.0, help="Instead: the share of each module's squared norm to keep, as 0.99."),
    ] = None,
    evaluate: Annotated[
        bool, Option("--eval", help="Score the original and the result on the run's eval data.")
    ] = False,
    as_json: AsJson = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Reduce the rank of an adapter.

    Example: lora-ft compress out --rank 2 --eval
    """
    silence_libraries()
    from lora_ft.commands.combine import compress_command

    compress_command(folder, out, rank=rank, energy=energy, evaluate=evaluate, as_json=as_json, trust=trust)
