"""The base of an adapter that is looked into: is it here, is it the right one, and where is each W in its files.

Nothing is downloaded and no model is built.
"""

from collections.abc import Sequence
from dataclasses import replace

from lora_ft.commands.inspect.adapter import Adapter, by_layer, layer_and_role
from lora_ft.commands.inspect.weights import Weight, locate
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.core.storage import read_json
from lora_ft.methods.lora.peft_config import WEIGHTS, targeted
from lora_ft.methods.trained import check_base
from lora_ft.model.files import Base, on_this_machine

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # keys of config.json
MOST_LAYERS = 10_000


def find_base(adapter: Adapter, name: str | None) -> Base | None:
    """The base that is named, else the recorded one; None, with a finding, if its weights can't be read here.

    Raises:
        ModelError: the one that is named is not here.
    """
    recorded = adapter.trained.record.get("base") or {}
    wanted = name or adapter.trained.base_name
    if not wanted:
        adapter.find("base", "the adapter names no base, so |W| is unknown. Name it with --base", False)
        return None
    base = on_this_machine(wanted, None if name else recorded.get("revision"))
    if base is None:
        if name:
            raise ModelError(f"--base {name}: no such model on this machine. Give its folder.")
        adapter.find("base", f"{wanted} is not on this machine, so |W| is unknown. Name a copy with --base", False)
        return None
    if base.gguf or not any(base.folder.glob("*.safetensors")):
        adapter.find("base", f"{wanted} has no safetensors, so |W| is unknown", False)
        return None
    base = replace(base, new_tokens=adapter.trained.new_tokens)
    if recorded.get("fingerprint"):
        try:
            check_base(adapter.trained.record, base, other_base=False)
        except ModelError as e:
            adapter.find("base", str(e).partition(" Name the right one")[0])
    return base


def base_weights(adapter: Adapter, base: Base) -> dict[str, Weight]:
    """Module -> its W; findings: modules that the base lacks, has in another shape or quantized, or that the adapter lacks."""
    lacking = [] if adapter.trained.record.get("slices") else _named_by_config(adapter, base)
    found = locate(base, adapter.modules, lacking)
    _tell_missing(adapter, [module for module in lacking if found.pop(module, None)])
    if absent := [module for module in adapter.modules if module not in found]:
        adapter.find("base", f"{base.name} has no {listed(absent, 3)}: is it another model's adapter?")
    shapes = []
    for module, (A, B) in adapter.tensors.items():
        if module in found and sorted(found[module].shape) != sorted((A.shape[1], B.shape[0])):
            shapes.append(f"{module} is {found[module].shape}, B A {(B.shape[0], A.shape[1])}")
            del found[module]
    if shapes:
        adapter.find("base", f"{base.name} has other shapes in {len(shapes)} modules: {shapes[0]}")
    if quantized := [module for module, stored in found.items() if not stored.is_float]:
        adapter.find("base", f"{base.name} is quantized, so |W| is unknown in {len(quantized)} modules", False)
    return {module: stored for module, stored in found.items() if stored.is_float}


def check_without_base(adapter: Adapter) -> None:
    """A hint at modules that may be missing, where neither a record nor the base can say it."""
    if not adapter.trained.record.get("slices"):
        _tell_missing(adapter, _named_by_config(adapter, None), problem=False)


def _named_by_config(adapter: Adapter, base: Base | None) -> list[str]:
    """What the adapter lacks of the modules that its config names: those that it has in some layers, in all others."""
    if any(finding.kind == "config" for finding in adapter.findings):
        return []
    layers = [layer for layer, _ in map(layer_and_role, adapter.modules) if layer is not None]
    config = read_json(base.folder / "config.json", ModelError) if base else {}
    config |= text if isinstance(text := config.get("text_config"), dict) else {}
    count = next((config[key] for key in LAYERS if isinstance(config.get(key), int)), max(layers, default=-1) + 1)
    candidates = {
        f"{module.removesuffix(f'{layer}.{role}')}{i}.{role}"
        for module, (layer, role) in ((module, layer_and_role(module)) for module in adapter.modules)
        if layer is not None
        for i in range(min(count, MOST_LAYERS))
    }
    try:
        named = targeted(adapter.trained.adapter_config, candidates, None) or set()
    except ModelError as e:  # a pattern that is invalid or takes too long
        adapter.find("config", str(e))
        return []
    return sorted(named - set(adapter.modules), key=by_layer)


def _tell_missing(adapter: Adapter, modules: Sequence[str], problem: bool = True) -> None:
    if modules:
        count = len(adapter.modules) + len(modules)
        text = f"{WEIGHTS}: {len(modules)} of the {count} modules that the config names are missing"
        adapter.find("missing", f"{text}: {listed(modules, 3)}", problem)
