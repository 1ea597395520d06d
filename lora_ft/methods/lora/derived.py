"""An adapter that was made of others, without training: its folder, and the record of what it was made of."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.core.names import published_name
from lora_ft.core.run_folder import TEMPLATE
from lora_ft.methods.lora.combine import Combined, Part, Settings
from lora_ft.methods.lora.files import CONFIG, WEIGHTS, write_record
from lora_ft.methods.lora.peft import AdapterFile, read_adapter
from lora_ft.methods.lora.peft_config import KEY
from lora_ft.methods.lora.portable import require_plain, write_plain
from lora_ft.methods.lora.whole import refuse_whole
from lora_ft.methods.model_card import CARD, export_card
from lora_ft.methods.trained import Trained
from lora_ft.model.tensor_file import read_header
from lora_ft.nn.lora import ALL_ROWS, RowBlocks

OF_ONE = ("data", "seed")  # what of the record is true of an adapter made of a single one
OF_ALL = ("config", "tokenizer", "chat_template")  # what the first one gives: how prompts are made


def open_part(folder: Path) -> AdapterFile:
    """The LoRA adapter in a folder. Raises ModelError if it is none, is damaged, or is more than A and B."""
    trained = Trained.open(folder)
    if trained.method != "lora":
        raise ModelError(f"{folder}: of method {trained.method}; only LoRA adapters are combined and compressed.")
    adapter = read_adapter(trained)
    require_plain(adapter)
    refuse_whole(adapter, "A and B alone are combined and compressed", "Merge it into its base instead.")
    if more := [name for name in read_header(folder / WEIGHTS) if not KEY.fullmatch(name)]:
        problem = f"has more than A and B, which alone are combined and compressed: {listed(more, 3)}"
        way_out = f"If these are copies of the base's weights, `lora-ft export {folder} --to peft` leaves them out."
        raise ModelError(f"{folder / WEIGHTS}: {problem}. {way_out}")
    return adapter


def check_same_base(adapters: Sequence[AdapterFile]) -> None:
    """Raise ModelError unless all were trained on one base: by its fingerprint, or by its name where one has none."""
    first, *others = (adapter.trained for adapter in adapters)
    for other in others:
        names = [of.base_name or "" for of in (first, other)]
        prints = [(of.record.get("base") or {}).get("fingerprint") for of in (first, other)]
        if prints[0] != prints[1] if all(prints) else names[0] != names[1]:
            shown = [
                f"{of.folder} is of {name or 'no base that it names'}" + (f" (fingerprint {mark[:12]})" if mark else "")
                for of, name, mark in zip((first, other), names, prints, strict=True)
            ]
            way_out = "Adapters can be combined if they were trained on the same base."
            hint = "" if all(prints) else f" If it is the same, write its name into {CONFIG} of one of them."
            raise ModelError(f"{'; '.join(shown)}. {way_out}{hint}")


def write_derived(output: Path, parts: Sequence[Part], settings: Settings, made: Combined) -> int:
    """Write an adapter made of `parts` as a new folder. Returns its rank.

    Its prompts are those of the first part that has a record. Raises FilesError if `output` exists or can't be written.
    """
    adapters = [part.adapter for part in parts]
    with storage.atomic_folder(output) as staged:
        first = next((adapter.trained for adapter in adapters if adapter.trained.record), adapters[0].trained)
        base_name = first.adapter_config.get("base_model_name_or_path") or first.base_name  # where PEFT finds it
        R = write_plain(staged, made.factors, adapters, base_name)
        files = [WEIGHTS, CONFIG]
        if template := first.chat_template:
            storage.write_file(staged / TEMPLATE, template)
            files.append(TEMPLATE)
        storage.write_file(
            staged / CARD, export_card("peft", published_name(first.base_name or "unknown"), output.name)
        )
        write_record(staged, _record(first, parts, settings, made, R), files, [CARD])
    return R


def _record(first: Trained, parts: Sequence[Part], settings: Settings, made: Combined, R: int) -> dict[str, Any]:
    kept = {key: first.record[key] for key in (*OF_ALL, *(OF_ONE if len(parts) == 1 else ())) if key in first.record}
    if isinstance((kept.get("config") or {}).get("adapter"), dict):
        kept["config"] = kept["config"] | {"adapter": kept["config"]["adapter"] | {"rank": R, "alpha": float(R)}}
    base = first.record.get("base") or {}
    return {
        "format": 1,
        "kind": "derived",
        **({"base": base} if base.get("name") else {}),
        **kept,
        "made_of": {
            **{key: value for key, value in asdict(settings).items() if value is not None},
            "parts": [_about(part) for part in parts],
            "error": made.error,
            "errors": made.errors,
        },
        "trainable_parameters": sum(A.numel() + B.numel() for A, B in made.factors.values()),
        "slices": {
            module: {"rank": len(A), "scaling": 1.0, "parts": {ALL_ROWS: list(RowBlocks.all(len(B)))}}
            for module, (A, B) in made.factors.items()
        },
        "versions": {name: version(name) for name in ("numpy", "torch", "transformers", "safetensors")},
    }


def _about(part: Part) -> dict[str, Any]:
    """What a record says of a part: enough to find it again, and what it was trained on."""
    trained = part.adapter.trained
    kept = {key: trained.record[key] for key in ("config", "data", "metrics", "made_of") if key in trained.record}
    return {
        "name": trained.folder.resolve().name,
        "weight": part.weight,
        "sha256": storage.sha256(trained.folder / WEIGHTS),
        "record": kept,
    }
