"""`lora-ft inspect`: what is in an adapter, or in two, from their files alone. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ft.commands.inspect.adapter import Adapter, read
from lora_ft.commands.inspect.base import base_weights, check_without_base, find_base
from lora_ft.commands.inspect.display import facts, show, write_html
from lora_ft.commands.inspect.intruders import count_intruders
from lora_ft.commands.inspect.measures import Module, measure, overlap
from lora_ft.commands.inspect.weights import Weight
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import echo, echo_json


def inspect_command(
    folders: Sequence[Path],
    *,
    base: str | None = None,
    intruders: bool = False,
    html: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print what is in an adapter, or in two and how they overlap; also as a page in `html`.

    base: its name, if not the recorded one. intruders: count intruder dimensions, which takes the singular vectors of every W.

    Raises:
        ModelError: no LoRA adapter there; or, after all was printed, one has a problem.
        FilesError: `html` is another tool's file, or can't be written.
    """
    inspected = [_inspect(folder, base, intruders) for folder in folders]
    adapters = [adapter for adapter, _ in inspected]
    overlaps = overlap(*adapters) if len(adapters) == 2 else []
    if as_json:
        content: dict[str, Any] = {"adapters": [_as_dict(*of) for of in inspected]}
        echo_json(content | ({"overlap": [asdict(entry) for entry in overlaps]} if len(adapters) == 2 else {}))
    else:
        show(inspected, overlaps)
    if html:
        write_html(html, inspected, overlaps)
        if not as_json:
            echo(html)
    counts = {of.trained.folder: sum(finding.problem for finding in of.findings) for of in adapters}
    if any(counts.values()):
        told = ", ".join(f"{folder} has {n} problem{'s'[: n > 1]}" for folder, n in counts.items() if n)
        raise ModelError(f"{told}: see above.")


def _inspect(folder: Path, base_name: str | None, intruders: bool) -> tuple[Adapter, list[Module]]:
    adapter = read(folder)
    base = find_base(adapter, base_name)
    weights: dict[str, Weight] = {}
    if base:
        try:
            weights = base_weights(adapter, base)
        except ModelError as e:
            adapter.find("base", f"{e} |W| is unknown.", False)
    else:
        check_without_base(adapter)
    modules = measure(adapter, weights)
    if intruders:
        count_intruders(adapter, modules, weights)
    return adapter, modules


def _as_dict(adapter: Adapter, modules: Sequence[Module]) -> dict[str, Any]:
    return {
        "adapter": str(adapter.trained.folder),
        "facts": dict(facts(adapter)),
        "findings": [finding._asdict() for finding in adapter.findings],
        "modules": [module.as_dict() for module in modules],
    }
