"""`lora-ft inspect`: what is in an adapter, or in two, from their files alone. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_ft.commands.inspect.adapter import Adapter, read
from lora_ft.commands.inspect.base import base_weights, check_without_base, find_base
from lora_ft.commands.inspect.display import facts, show, write_html
from lora_ft.commands.inspect.intruders import count_intruders
from lora_ft.commands.inspect.measures import Module, decompose, measure, overlap
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import echo, echo_json
from lora_ft.methods.lora.factors import SVD
from lora_ft.model.tensor_file import Stored


@dataclass
class Inspected:
    """An adapter with its numbers."""

    adapter: Adapter
    decomposed: dict[str, SVD]
    modules: list[Module]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        trained = self.adapter.trained
        return {
            "adapter": str(trained.folder),
            "facts": dict(facts(self.adapter)),
            "findings": [finding._asdict() for finding in self.adapter.findings],
            "modules": [module.as_dict() for module in self.modules],
        }


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
    one, other = inspected[0], inspected[1] if len(inspected) > 1 else None
    overlaps = overlap(one.adapter, other.adapter, one.decomposed, other.decomposed) if other else []
    shown = [(of.adapter, of.modules) for of in inspected]
    if as_json:
        content: dict[str, Any] = {"adapters": [of.as_dict() for of in inspected]}
        echo_json(content | ({"overlap": [asdict(entry) for entry in overlaps]} if other else {}))
    else:
        show(shown, overlaps)
    if html:
        write_html(html, shown, overlaps)
        if not as_json:
            echo(html)
    problems = {of.adapter.trained.folder: [f for f in of.adapter.findings if f.problem] for of in inspected}
    if broken := [
        f"{folder} has {len(found)} problem{'s'[: len(found) > 1]}" for folder, found in problems.items() if found
    ]:
        raise ModelError(f"{', '.join(broken)}: see above.")


def _inspect(folder: Path, base_name: str | None, intruders: bool) -> Inspected:
    adapter = read(folder)
    base = find_base(adapter, base_name)
    weights: dict[str, Stored] = {}
    if base:
        try:
            weights = base_weights(adapter, base)
        except ModelError as e:
            adapter.find("base", f"{e} |W| is unknown.", False)
    else:
        check_without_base(adapter)
    decomposed = decompose(adapter)
    modules = measure(adapter, decomposed, weights)
    if intruders:
        count_intruders(adapter, modules, weights)
    return Inspected(adapter, decomposed, modules)
