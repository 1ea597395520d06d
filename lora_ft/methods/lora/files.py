"""LoRA layers to and from PEFT's two files, exact to the bit.

PEFT stores one A and one B per module. Here a module may have several parts, such as q and v of a fused projection. Their A are
stacked into one, and each B is placed in the columns of its A and the rows of its part. Modules that have one scaling s get the
same rank R by zero padding, and lora_alpha = s R, so every reader computes h = W x + s B A x. With several scalings each keeps
its own rank, in PEFT's rank_pattern and alpha_pattern. The record's `slices` restore the parts.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.compatibility import check_ab_shapes, check_against, check_copies
from lora_ft.methods.lora.experts import packed, unpack_for
from lora_ft.methods.lora.inject import lora_layers
from lora_ft.methods.lora.multi import adapter_names, add_adapter
from lora_ft.methods.lora.peft import PREFIX, RECORD, WEIGHTS, AdapterFile, Parts, differences, read_adapter
from lora_ft.methods.lora.peft_config import CONFIG, file_rank, file_ranks
from lora_ft.methods.lora.stacked import from_peft_matrices, to_peft_matrices, undivided_hint
from lora_ft.methods.lora.targets import suffixes
from lora_ft.methods.lora.token_rows import apply_rows, copy_rows, rows_tensors, trainable_token_indices
from lora_ft.methods.lora.whole import apply_whole, copy_whole, modules_to_save, refuse_whole, whole_tensors
from lora_ft.methods.trained import Trained
from lora_ft.model.tensor_file import read_header
from lora_ft.nn.adapted import is_conv1d
from lora_ft.nn.dora import DoRALinear
from lora_ft.nn.expert_names import PATH, parameter_of
from lora_ft.nn.lora import ALL_ROWS, LoRALinear, RowBlocks


def save_adapter(model: nn.Module, folder: Path, base_name: str) -> dict[str, dict]:
    """Write the adapter of `model` into an existing folder as PEFT's two files. Returns the record's `slices`.

    The same adapter gives the same bytes. A local `base_name` is written as it was given, so that PEFT finds the base;
    `lora-ft export` writes portable names.
    """
    layers = lora_layers(model)
    if not layers:
        raise ModelError("there is no adapter to save: the model has no LoRA layers")
    parts = parts_record(model)
    ranks, R = file_ranks(parts), file_rank(parts)
    alphas = {module: as_int(layer.scaling * ranks[module]) for module, layer in layers.items()}
    alpha = next(alphas[module] for module in layers if ranks[module] == R)
    pairs, parameters = packed({module: to_peft_matrices(layer, ranks[module]) for module, layer in layers.items()})
    plain = [layer for module, layer in layers.items() if module in pairs]
    tensors = {}
    for module, (A, B) in pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
        if isinstance(layer := layers.get(module), DoRALinear):
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = layer.lengths().cpu()
    tensors |= {f"{PREFIX}{name}": value.cpu().contiguous() for name, value in whole_tensors(model).items()}
    tensors |= {key: rows.cpu().contiguous() for key, rows in rows_tensors(model).items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.expanduser(base_name),
        "r": R,
        "lora_alpha": alpha,
        # PEFT has no dropout of experts' inputs, and refuses one
        "lora_dropout": 0.0 if parameters else max(layer.dropout.p if layer.dropout else 0.0 for layer in plain),
        "target_modules": target_modules(model),
        "bias": "none",
        "fan_in_fan_out": bool(plain) and all(is_conv1d(layer.base) for layer in plain),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": modules_to_save(model) or None,
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "use_rslora": False,  # lora_alpha includes it
    }
    if ids := trainable_token_indices(model):
        config["trainable_token_indices"] = ids
    if parameters:
        config["target_parameters"] = parameters
    if rank_pattern := {re.escape(parameter_of(module)): own for module, own in ranks.items() if own != R}:
        config["rank_pattern"] = rank_pattern
    if alpha_pattern := {re.escape(parameter_of(module)): own for module, own in alphas.items() if own != alpha}:
        config["alpha_pattern"] = alpha_pattern
    storage.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    storage.write_json(folder / CONFIG, config)
    return parts


def bytes_on_disk(model: nn.Module) -> int:
    """The bytes of the tensors that `save_adapter` writes, float32."""
    ranks, others = file_ranks(parts_record(model)), whole_tensors(model) | rows_tensors(model)
    numbers = sum(tensor.numel() for tensor in others.values())
    for module, layer in lora_layers(model).items():
        numbers += ranks[module] * (layer.in_features + layer.out_features)
        numbers += layer.out_features if isinstance(layer, DoRALinear) else 0
    return 4 * numbers


def write_record(folder: Path, record: dict, names: Iterable[str], mentions: Iterable[str] = ()) -> None:
    """Write lora_ft.json, with size and hash of the files `names` and the mere names of `mentions`. Always the last file.

    An adapter's tensors have hashes of their own, by which `inspect` tells which were changed or exchanged.
    """
    files = storage.manifest(folder, names)
    if WEIGHTS in files:
        files[WEIGHTS]["tensors"] = {name: stored.hash() for name, stored in read_header(folder / WEIGHTS).items()}
    storage.write_json(folder / RECORD, {**record, "files": files | dict.fromkeys(sorted(mentions))})


def parts_record(model: nn.Module) -> dict[str, dict]:
    """The record's `slices`: module -> rank, scaling, parts (part -> blocks, width, start, length)."""
    return {
        module: {
            "rank": layer.stored_rank,
            "scaling": layer.scaling,
            "parts": {part: list(rows) for part, rows in layer.rows.items()},
        }
        for module, layer in lora_layers(model).items()
    }


def as_int(number: float) -> float:
    """A whole number as an int, as PEFT writes it."""
    return int(number) if number == int(number) else number


def load_adapter(
    model: nn.Module, folder: Path | str, name: str | None = None, *, trainable: bool = False
) -> AdapterFile:
    """Put an adapter from a folder, lora-ft's or PEFT's, on `model`, whose base weights this freezes.

    lora-ft's comes back in the parts it was trained in, bit for bit; PEFT's as one part of rank r per module. Without a `name`
    it is the model's only adapter, active at once, to train further or to merge. With a name it is one of several that share
    the base; `use(model, name)` or `mixed(model, names)` activates it.

    Raises:
        ModelError: it is damaged or does not fit, or the model has its only adapter already, or one of this name.
    """
    return apply_adapter(model, read_adapter(Trained.open(Path(folder))), name, trainable=trainable)


def apply_adapter(
    model: nn.Module, adapter: AdapterFile, name: str | None = None, *, trainable: bool = False
) -> AdapterFile:
    """Put an adapter that has been read on `model`; see `load_adapter`."""
    if name is not None and trainable:
        raise ValueError("adapters by name are for inference: load the one to train without a name")
    if name is not None:
        refuse_whole(
            adapter, "adapters by name share the base's modules", "Load it alone, without a name, or merge it."
        )
    if lora_layers(model) or (name is None and adapter_names(model)):
        way_out = "load the base again, or merge the adapter, or load every adapter by name"
        raise ModelError(f"the model has an adapter already: {way_out}")
    unpack_for(model, adapter.stored)
    model.requires_grad_(False)
    layers = adapter_layers(model, adapter, trainable)
    if name is None:
        for module, layer in layers.items():
            model.set_submodule(module, layer)
        apply_whole(model, adapter, trainable)
        apply_rows(model, adapter, trainable)
    else:
        add_adapter(model, name, layers)
    return adapter


def adapter_layers(model: nn.Module, adapter: AdapterFile, trainable: bool = False) -> dict[str, LoRALinear]:
    """Path -> an adapter's LoRALinear over the layer of `model` there, which is not changed. Raises as `load_adapter`."""
    linear = check_against(model, adapter)
    check_copies(model, adapter)
    layers: dict[str, LoRALinear] = {}
    for module, (A, B) in adapter.tensors.items():
        base = linear[module]
        parts = adapter.parts.get(module) or Parts(A.shape[0], {ALL_ROWS: RowBlocks.all(B.shape[0])})
        kind = DoRALinear if adapter.dora else LoRALinear
        layer = kind(base, parts.rank, adapter.scalings[module], parts.rows)
        from_peft_matrices(layer, A, B, adapter.folder / WEIGHTS, module)
        if isinstance(layer, DoRALinear):
            layer.copy_lengths(adapter.lengths[module])
        layer.requires_grad_(trainable)
        layer.base.requires_grad_(False)
        layers[module] = layer.train(base.training)
    return layers


def initialize_from(model: nn.Module, adapter: AdapterFile) -> None:
    """Copy an adapter's weights into the LoRA layers that `model` has; ModelError unless modules, rows and ranks are the same.

    Where the scalings differ, B is multiplied by their ratio, so that the model computes what the files define. It does so too
    where DoRA starts from LoRA; ModelError where LoRA would start from DoRA.
    """
    layers, path = lora_layers(model), adapter.folder / WEIGHTS
    if adapter.dora and not all(isinstance(layer, DoRALinear) for layer in layers.values()):
        raise ModelError(f"{path}: was trained with DoRA, and this run is not. Set adapter.dora: true.")
    if adapter.stored.keys() != layers.keys():
        raise ModelError(differences(path, layers.keys() - adapter.stored.keys(), adapter.stored.keys() - layers))
    for module, (A, B) in adapter.stored.items():
        layer, parts = layers[module], adapter.parts.get(module)
        check_ab_shapes(path, module, A, B, layer.in_features, layer.out_features)
        ours = (layer.stored_rank, list(layer.rows.values()))
        if (parts and (parts.rank, list(parts.rows.values())) != ours) or A.shape[0] < ours[0] * len(layer.rows):
            theirs = f"rank {parts.rank}, parts {', '.join(parts.rows)}" if parts else f"rank {A.shape[0]}"
            undivided = ALL_ROWS not in layer.rows and (not parts or ALL_ROWS in parts.rows)
            way_out = undivided_hint(module) if undivided else "Make rank and targets the same."
            ours_in_words = f"rank {layer.stored_rank}, parts {', '.join(layer.rows)}"
            raise ModelError(f"{path}: {module} has {theirs}; this run adapts it with {ours_in_words}. {way_out}")
    check_copies(model, adapter)
    copy_whole(model, adapter)
    copy_rows(model, adapter)
    for module, (A, B) in adapter.tensors.items():
        layer = layers[module]
        from_peft_matrices(layer, A, B, path, module)
        if layer.scaling != adapter.scalings[module]:
            for B_part in layer.lora_B.values():
                B_part.data.mul_(adapter.scalings[module] / layer.scaling)
        if isinstance(layer, DoRALinear) and adapter.dora:
            layer.copy_lengths(adapter.lengths[module])
        elif isinstance(layer, DoRALinear):
            layer.keep_lengths()


def target_modules(model: nn.Module) -> list[str]:
    """The shortest dotted suffixes that match the adapted modules and no other module of the base, by PEFT's rule."""
    adapted = {path: layer for path, layer in lora_layers(model).items() if not PATH.fullmatch(path)}
    inside = tuple(f"{path}." for path in adapted)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    others = {suffix for name in names if name not in adapted for suffix in suffixes(name)}
    return sorted({next(s for s in suffixes(name) if s not in others) for name in adapted})
