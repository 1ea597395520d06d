"""An adapter as its files have it, read without judging: what is wrong with it becomes a finding, and the rest is read on.

Imports no torch. `methods/lora/peft.py` reads an adapter to apply it, and refuses at the first fault.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.core.run_folder import RECORD, read_record
from lora_ft.core.storage import verify_manifest
from lora_ft.methods.lora.expert_files import by_expert, expert_parameter
from lora_ft.methods.lora.factors import Array
from lora_ft.methods.lora.peft_config import CONFIG, KEY, LENGTHS, PREFIX, WEIGHTS, by_pattern, check_config
from lora_ft.methods.trained import Trained, read_adapter_config
from lora_ft.model.tensor_file import Stored, read_header
from lora_ft.nn.scaling import scaling

LAYER = re.compile(r"[0-9]{1,6}")


class Finding(NamedTuple):
    """problem: the adapter doesn't compute what was trained, or can't be used; else a hint. kind: a word, for scripts."""

    kind: str
    text: str
    problem: bool = True


@dataclass
class Adapter:
    """tensors: module -> A (R, in) and B (out, R), float32, of the modules that are whole. scalings: module -> s.

    modules: of all lora_A and lora_B in the file, in the order of layers; each expert is one. stored: name -> where
    each tensor is.
    """

    trained: Trained
    tensors: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def find(self, kind: str, text: str, problem: bool = True) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, text, problem))


def read(folder: Path) -> Adapter:
    """The adapter in a folder, with what is wrong with its files.

    Raises:
        ModelError: there is no LoRA adapter.
    """
    if not (folder / CONFIG).is_file():
        problem = "no adapter_config.json in that folder" if folder.is_dir() else "no such folder"
        raise ModelError(f"{folder}: {problem}. Give the folder of a LoRA adapter, of lora-ft or PEFT.")
    adapter = Adapter(Trained(folder, "lora", {}, read_adapter_config(folder)))
    if (kind := adapter.trained.adapter_config.get("peft_type")) != "LORA":
        raise ModelError(f"{folder}: holds {kind or 'an adapter of another method'}; inspect reads LoRA adapters.")
    try:
        adapter.trained.record.update(read_record(folder) or {})
    except ModelError as e:
        adapter.find("record", str(e))
    try:
        check_config(folder / CONFIG, adapter.trained.adapter_config)
    except ModelError as e:
        adapter.find("config", str(e))
    try:
        adapter.stored = read_header(folder / WEIGHTS)
    except ModelError as e:
        adapter.find("truncated" if "truncated" in str(e) else "damaged", str(e))
    _read_tensors(adapter)
    _check_manifest(adapter)
    _check_record(adapter)
    return adapter


def _read_tensors(adapter: Adapter) -> None:
    """A, B and s of each module; findings: one without the other, ranks that don't fit, NaN and Inf."""
    folder, config = adapter.trained.folder, adapter.trained.adapter_config
    pairs: dict[str, dict[str, Stored]] = {}
    for name, stored in adapter.stored.items():
        if match := KEY.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = stored
    others = [name for name in adapter.stored if not KEY.fullmatch(name) and not LENGTHS.fullmatch(name)]
    if any(LENGTHS.fullmatch(name) for name in adapter.stored):
        adapter.find("dora", "DoRA: the lengths of rows are trained too; what follows is about s B A alone", False)
    if others:
        adapter.find("others", f"{len(others)} tensors that are no lora_A or lora_B: {listed(others, 3)}", False)
    named = config.get("target_parameters")
    parameters = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    wrong: dict[str, list[str]] = {"NaN": [], "Inf": []}
    for stored_as, pair in pairs.items():
        parameter = expert_parameter(stored_as, parameters)
        module = parameter or stored_as
        if not parameter:
            adapter.modules.append(module)
        if absent := {"A", "B"} - pair.keys():
            adapter.find("missing", f"{WEIGHTS}: {module} has no lora_{absent.pop()}")
            continue
        A, B = pair["A"], pair["B"]
        try:
            rank = by_pattern(folder / CONFIG, config.get("rank_pattern"), module, config["r"])
            alpha = by_pattern(folder / CONFIG, config.get("alpha_pattern"), module, config["lora_alpha"])
            s = scaling(rank, alpha, config.get("use_rslora") is True)
        except (ModelError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            s = np.nan
        if not np.isfinite(s):
            continue  # `check_config` has told what is wrong with the config
        count = A.shape[0] // rank if parameter and A.shape else 1
        if len(A.shape) != 2 or len(B.shape) != 2 or (A.shape[0], B.shape[1]) != (rank * count, rank * count):
            says = f"{CONFIG} says rank {rank}"
            adapter.find("rank", f"{module}: A is {_shape(A)} and B {_shape(B)}, but {says}")
            continue
        if not (A.is_float and B.is_float):
            adapter.find("dtype", f"{module}: {A.dtype} and {B.dtype} are not floating-point types")
            continue
        values = A.values(), B.values()
        bad = {
            kind: [letter for letter, array in zip("AB", values, strict=True) if test(array).any()]
            for kind, test in (("NaN", np.isnan), ("Inf", np.isinf))
        }
        for kind, letters in bad.items():
            wrong[kind] += [f"{module}.lora_{letter}" for letter in letters]
        own = by_expert(*values, rank) if parameter else None
        found = {f"{module}.{expert}": pair for expert, pair in enumerate(own)} if own else {module: values}
        adapter.modules += found if parameter else []
        if not any(bad.values()):
            adapter.tensors |= found
            adapter.scalings |= dict.fromkeys(found, s)
    adapter.modules.sort(key=by_layer)
    adapter.tensors = {module: adapter.tensors[module] for module in adapter.modules if module in adapter.tensors}
    for kind, names in wrong.items():
        if names:
            adapter.find(kind.lower(), f"{WEIGHTS}: {kind} in {listed(names, 3)}")


def _check_manifest(adapter: Adapter) -> None:
    """Findings: files that changed since the record was written, and which tensors of them."""
    folder, files = adapter.trained.folder, adapter.trained.record.get("files") or {}
    for name, entry in files.items():
        try:
            verify_manifest(folder, {name: entry}, ModelError)
        except ModelError as e:
            moved = _moved_tensors(adapter, entry) if name == WEIGHTS and isinstance(entry, dict) else []
            for finding in moved or [Finding("changed", str(e))]:
                adapter.findings.append(finding)
    if not (folder / RECORD).is_file():
        hint = f"no {RECORD}: whether tensors were changed, or layers exchanged, since the training can't be known"
        adapter.find("record", hint, False)


def _moved_tensors(adapter: Adapter, entry: Mapping[str, Any]) -> list[Finding]:
    """Which layers have each other's tensors, and which tensors are others, by the hashes in the manifest; [] without them."""
    recorded = entry.get("tensors")
    if not isinstance(recorded, dict):
        return []
    hashes = {name: stored.hash() for name, stored in adapter.stored.items()}
    changed = [name for name in hashes if name in recorded and hashes[name] != recorded[name]]
    origin = {str(found): name for name, found in recorded.items()}
    swapped: dict[tuple[str, str], int] = {}
    other = []
    for name in changed:
        source = origin.get(hashes[name])
        if source is None:
            other.append(name)
        else:
            swapped[(_place(name), _place(source))] = swapped.get((_place(name), _place(source)), 0) + 1
    findings = []
    for (here, there), count in swapped.items():
        if (there, here) in swapped and here > there:
            continue  # told from the other side
        back = swapped.get((there, here), 0)
        found = f"{here} and {there} are swapped" if back else f"{here} has what was {there}"
        findings.append(Finding("swapped", f"{WEIGHTS}: {found}: {count + back} tensors, by the record's hashes"))
    if other:
        findings.append(Finding("changed", f"{WEIGHTS}: {len(other)} tensors have changed: {listed(other, 3)}"))
    return findings


def _check_record(adapter: Adapter) -> None:
    """Findings: modules and scalings that are not those of the record."""
    slices = adapter.trained.record.get("slices") or {}
    if slices and adapter.stored:
        for words, names in (
            ("modules of the record are missing", slices.keys() - adapter.modules),
            ("modules are not in the record", adapter.modules - slices.keys()),
        ):
            if names:
                which = listed(sorted(names, key=by_layer), 3)
                adapter.find("missing", f"{WEIGHTS}: {len(names)} of {len(slices)} {words}: {which}")
    wrong = {}
    for module, s in adapter.scalings.items():
        entry = slices.get(module)
        recorded = entry.get("scaling") if isinstance(entry, dict) else None
        if isinstance(recorded, int | float) and not np.isclose(s, recorded, rtol=1e-6):
            wrong[module] = (s, recorded)
    if wrong:
        s, recorded = next(iter(wrong.values()))
        alpha = adapter.trained.adapter_config.get("lora_alpha")
        text = f"{CONFIG}: lora_alpha {alpha} makes s = {s:g}, but the record says s = {recorded:g}"
        adapter.find("alpha", f"{text}, in {len(wrong)} of {len(slices)} modules")


def layer_and_role(module: str) -> tuple[int | None, str]:
    """The layer, the first number in a module's path, and the name in it; (None, path) for a module outside all layers."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if LAYER.fullmatch(part)), None)
    return (None, module) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))


def by_layer(module: str) -> tuple[int, str]:
    """A key that sorts modules by their layers, those outside all layers last."""
    layer, role = layer_and_role(module)
    return (10**9 if layer is None else layer, role)


def _place(name: str) -> str:
    """`layer 3` for a tensor's name; its module if that is outside all layers."""
    module = name.removeprefix(PREFIX)
    layer, _ = layer_and_role(module)
    return module if layer is None else f"layer {layer}"


def _shape(stored: Stored) -> str:
    return str(stored.shape).replace(" ", "")
