"""Adapters of a model to and from PEFT's files: what is saved is what the layers compute, and comes back bit for bit.

PEFT knows one A and B a module. A fused projection adapted in parts is written as the stacked A and a B whose blocks
stand in the parts' rows; with one rank R for all modules (zero rows of A, zero columns of B) and lora_alpha = s R the
files say the same to every reader: h = W x + s B A x. The record's `slices` say how to take them apart again.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.core.names import portable_name
from lora_ft.methods.lora.compatibility import check_against, check_copies, check_shape
from lora_ft.methods.lora.inject import lora_layers
from lora_ft.methods.lora.multi import adapter_names, add_adapter
from lora_ft.methods.lora.peft import PREFIX, RECORD, WEIGHTS, AdapterFile, Slices, differences, read_adapter
from lora_ft.methods.lora.peft_config import CONFIG
from lora_ft.methods.trained import Trained
from lora_ft.nn.lora import ALL_ROWS, LoRALinear, RowBlocks

__all__ = ["CONFIG", "RECORD", "WEIGHTS", "AdapterFile", "initialize_from", "load_adapter", "read_adapter"]
__all__ += ["save_adapter", "slices", "write_record"]


def save_adapter(model: nn.Module, folder: Path, base_name: str, *, record: dict | None = None) -> None:
    """Write the model's adapters into an existing folder as PEFT's two files, and the record last if one is given.

    The same adapters give the same bytes. `base_name` is written as PEFT's base_model_name_or_path; of an absolute path
    only the last part, so that no adapter tells about the machine it comes from.
    """
    layers = lora_layers(model)
    if not layers:
        raise ModelError("there is no adapter to save: the model has no LoRA layers")
    R = max(layer.rank * len(layer.rows) for layer in layers.values())
    s = common_scaling(layers)
    tensors = {}
    for module, layer in layers.items():
        A, B = pack(layer, R)
        # One alpha for all: where a module's scaling differs, the ratio goes into B. (In a run they don't differ.)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B if layer.scaling == s else B * (layer.scaling / s)
    alpha = s * R
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": portable_name(base_name),
        "r": R,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": max((layer.dropout.p if layer.dropout else 0.0) for layer in layers.values()),
        "target_modules": target_modules(layers, module_names(model)),
        "bias": "none",
        "fan_in_fan_out": all(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,  # lora_alpha says it all
    }
    storage.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    storage.write_json(folder / CONFIG, config)
    if record is not None:
        write_record(folder, {**record, "slices": slices(model)}, [WEIGHTS, CONFIG])


def bytes_on_disk(model: nn.Module) -> int:
    """Bytes of the tensors that `save_adapter` writes: one rank for all modules, each as large as its widest part needs."""
    layers = lora_layers(model).values()
    R = max(layer.rank * len(layer.rows) for layer in layers)
    return sum(4 * R * (layer.in_features + layer.out_features) for layer in layers)


def write_record(folder: Path, record: dict, names: Iterable[str], mentions: Iterable[str] = ()) -> None:
    """Write lora_ft.json with the manifest of `names`; `mentions` are listed by name only. Always the last file."""
    files = storage.manifest(folder, names) | dict.fromkeys(sorted(mentions))
    storage.write_json(folder / RECORD, {**record, "files": files})


def slices(model: nn.Module) -> dict[str, dict]:
    """For the record: module -> rank, scaling (as filed) and parts, each as [blocks, width, start, length]."""
    layers = lora_layers(model)
    s = common_scaling(layers) if layers else 0.0
    return {
        module: {"rank": layer.rank, "scaling": s, "parts": {part: list(rows) for part, rows in layer.rows.items()}}
        for module, layer in layers.items()
    }


def load_adapter(
    model: nn.Module, folder: Path | str, name: str | None = None, *, trainable: bool = False
) -> AdapterFile:
    """Put an adapter from a folder, ours or PEFT's, into `model`, whose base weights are frozen by this.

    Ours come back in the parts they were trained in, bit for bit; PEFT's as one part of rank R a module. Without a `name`
    it is the model's one adapter, in use at once, to go on training or to merge. With a name it is one of as many as
    wanted that share the base, none of them in use before `use(model, name)` or `mixed(model, names)`.

    Raises:
        ModelError: as `Trained.open`, `read_adapter` and `apply_adapter`.
    """
    return apply_adapter(model, read_adapter(Trained.open(Path(folder))), name, trainable=trainable)


def apply_adapter(
    model: nn.Module, adapter: AdapterFile, name: str | None = None, *, trainable: bool = False
) -> AdapterFile:
    """`load_adapter` of an adapter that has been read.

    Raises:
        ModelError: as `check_against` and `check_copies`; or the model has its one adapter already, or one of this name.
    """
    if name is not None and trainable:
        raise ValueError("an adapter by a name is for use alone: load the one to train without a name")
    if lora_layers(model) or (name is None and adapter_names(model)):
        raise ModelError(
            "the model has an adapter already: load the base again, or merge the first one; or load each by a name"
        )
    linear = check_against(model, adapter)
    check_copies(model, adapter)
    model.requires_grad_(False)
    layers = {}
    for module, (A, B) in adapter.tensors.items():
        base = linear[module]
        cut = adapter.slices.get(module) or Slices(A.shape[0], {ALL_ROWS: RowBlocks.all(B.shape[0])})
        layer = LoRALinear(base, cut.rank, adapter.scalings[module], cut.rows)
        fill(layer, A, B, adapter.folder / WEIGHTS, module)
        layer.requires_grad_(trainable)
        layer.base.requires_grad_(False)
        layers[module] = layer.train(base.training)
    if name is not None:
        add_adapter(model, name, layers)
        return adapter
    for module, layer in layers.items():
        model.set_submodule(module, layer)
    return adapter


def initialize_from(model: nn.Module, adapter: AdapterFile) -> None:
    """Copy an adapter's weights into the adapters that `model` already has.

    They must cover the same rows at the same rank. Where the scalings differ, B is multiplied by their ratio: the model
    computes what the files say.

    Raises:
        ModelError: as `read_adapter`; or modules, rows or ranks differ (each difference is named).
    """
    layers, path = lora_layers(model), adapter.folder / WEIGHTS
    if adapter.tensors.keys() != layers.keys():
        raise ModelError(differences(path, layers.keys() - adapter.tensors.keys(), adapter.tensors.keys() - layers))
    check_copies(model, adapter)
    for module, (A, B) in adapter.tensors.items():
        layer, cut = layers[module], adapter.slices.get(module)
        check_shape(path, module, A, B, layer.in_features, layer.out_features)
        theirs = (cut.rank, list(cut.rows.values())) if cut else (layer.rank, list(layer.rows.values()))
        if theirs != (layer.rank, list(layer.rows.values())) or A.shape[0] < layer.rank * len(layer.rows):
            found = f"rank {cut.rank}, parts {', '.join(cut.rows)}" if cut else f"rank {A.shape[0]}"
            whole = ALL_ROWS not in layer.rows and (not cut or ALL_ROWS in cut.rows)
            way = _whole(module) if whole else "Make rank and targets the same."
            raise ModelError(
                f"{path}: {module} has {found}; this run adapts it with rank {layer.rank}, "
                f"parts {', '.join(layer.rows)}. {way}"
            )
    for module, (A, B) in adapter.tensors.items():
        layer = layers[module]
        fill(layer, A, B, path, module)
        if layer.scaling != adapter.scalings[module]:
            for B_part in layer.lora_B.values():
                B_part.data.mul_(adapter.scalings[module] / layer.scaling)


def pack(layer: LoRALinear, R: int) -> tuple[Tensor, Tensor]:
    """One A (R, in) and B (out, R) for all parts of a layer: B A is what the parts add up to, exactly."""
    A = torch.zeros(R, layer.in_features)
    B = torch.zeros(layer.out_features, R)
    for i, (part, rows) in enumerate(layer.rows.items()):
        span = slice(i * layer.rank, (i + 1) * layer.rank)
        A[span] = layer.lora_A[part].detach().float().cpu()
        rows.of(B[:, span].T).copy_(
            layer.lora_B[part].detach().float().cpu().T.unflatten(-1, (rows.blocks, rows.length))
        )
    return A, B


@torch.no_grad()
def fill(layer: LoRALinear, A: Tensor, B: Tensor, path: Path, module: str) -> None:
    """The inverse of `pack`; ModelError if the files hold anything outside the parts' blocks."""
    rest_A, rest_B = A.clone(), B.clone()
    for i, (part, rows) in enumerate(layer.rows.items()):
        span = slice(i * layer.rank, (i + 1) * layer.rank)
        layer.lora_A[part].copy_(A[span])
        layer.lora_B[part].copy_(rows.of(B[:, span].T).flatten(-2).T)
        rest_A[span] = 0
        rows.of(rest_B[:, span].T).zero_()
    for letter, rest in (("A", rest_A), ("B", rest_B)):
        if rest.any():
            key = f"{PREFIX}{module}.lora_{letter}.weight"
            raise ModelError(
                f"{path}: {key} holds more than rank {layer.rank} of the parts {', '.join(layer.rows)}. {_whole(module)}"
            )


def _whole(module: str) -> str:
    name = module.rpartition(".")[2]
    return f"If it adapts {name} as a whole, so must this run: adapter.targets: [], adapter.modules: [{name}]."


def common_scaling(layers: dict[str, LoRALinear]) -> float:
    return next(iter(layers.values())).scaling


def module_names(model: nn.Module) -> list[str]:
    """The paths that the bare base has: what lies inside of a LoRA layer is ours."""
    inside = tuple(f"{path}." for path in lora_layers(model))
    return [name for name, _ in model.named_modules() if name and not (inside and name.startswith(inside))]


def target_modules(adapted: Iterable[str], names: list[str]) -> list[str]:
    """The shortest dotted suffixes that name the adapted modules and no others (PEFT: equal, or ends in .suffix)."""
    adapted = set(adapted)
    others: set[str] = set()
    for name in names:
        if name not in adapted:
            others.update(suffixes(name))
    return sorted({next(s for s in suffixes(name) if s not in others) for name in adapted})


def suffixes(name: str) -> list[str]:
    """Shortest first: c_attn, attn.c_attn, 0.attn.c_attn, ..."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]
