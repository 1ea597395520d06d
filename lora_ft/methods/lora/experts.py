"""LoRA on the experts of a mixture: their layers in a model, and their A and B as PEFT's `target_parameters`."""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.expert_files import INNER
from lora_ft.nn.expert_names import PARAMETERS, PATH
from lora_ft.nn.experts import UnpackedExperts, is_packed

Pairs = dict[str, tuple[Tensor, Tensor]]  # module -> A and B


def unpack(model: nn.Module, paths: Iterable[str]) -> None:
    """Give each expert of the mixtures at `paths` linear layers of its own, in place.

    Raises:
        ModelError: the base is sharded.
    """
    for path in paths:
        module = model.get_submodule(path)
        if hasattr(module.down_proj, "full_tensor"):
            raise ModelError(f"{path}: experts can't be adapted with trainer.fsdp: leave one of the two out")
        model.set_submodule(path, UnpackedExperts(module).train(module.training))


def unpack_for(model: nn.Module, modules: Iterable[str]) -> None:
    """`unpack` the experts of the model that are among the `modules` of an adapter."""
    adapted = {match[1] for module in modules if (match := PATH.fullmatch(module))}
    unpack(model, [path for path, module in model.named_modules() if path in adapted and is_packed(module)])


def require_all(model: nn.Module, modules: Iterable[str]) -> None:
    """Raise ModelError unless an adapted parameter is adapted for all experts."""
    adapted = set(modules)
    for path, mixture in model.named_modules():
        if isinstance(mixture, UnpackedExperts):
            for name in PARAMETERS:
                own = {f"{path}.{name}.{i}" for i in range(len(getattr(mixture, name, ())))}
                if own & adapted and own - adapted:
                    raise ModelError(
                        f"{path}.{name}: some experts are adapted and some are not; PEFT's format has all or none"
                    )


def packed(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Pairs, list[str]]:
    """PEFT's matrices by module, and target_parameters; see expert_files.py for their layout.

    Experts whose rank is below that of others of their parameter get zeros: a parameter has one rank there.
    """
    named = {module: pair for module, pair in pairs.items() if not PATH.fullmatch(module)}
    experts: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
    for module, pair in pairs.items():
        if match := PATH.fullmatch(module):
            experts.setdefault(match[1], {}).setdefault(match[2], []).append(pair)
    parameters = []
    for path, by_name in experts.items():
        names = [name for name in PARAMETERS if name in by_name]
        parameters += [f"{path}.{name}" for name in names]
        for depth, name in enumerate(reversed(names)):
            rank = max(len(A) for A, _ in by_name[name])
            own = [(F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A)))) for A, B in by_name[name]]
            A, B = (torch.stack(matrices) for matrices in zip(*own, strict=True))
            named[path + depth * INNER] = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1).contiguous()
    return named, parameters
