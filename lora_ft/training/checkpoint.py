"""The state of a run that a checkpoint stores beside the adapter, complete enough to resume to the bit.

Tensors go to state.safetensors and everything else to state.json; no pickles.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState

from lora_ft.core.errors import FilesError
from lora_ft.core.run_folder import RECORD
from lora_ft.core.storage import read_json, read_tensors, verify_manifest, write_json, write_tensors
from lora_ft.methods.lora.inject import trainable
from lora_ft.model.device import random_states, set_random_states

TENSORS, JSON = "state.safetensors", "state.json"
RowsBySet = dict[str, dict[str, np.ndarray]]  # eval set -> metric -> what each row contributes


@dataclass
class LogTotals:
    """Sums for the log: since its last line (loss_sum, line_supervised, line_tokens) and since the run started (the rest)."""

    loss_sum: float = 0.0
    line_supervised: int = 0
    line_tokens: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def add(self, loss_sum: float, supervised: int, tokens: int) -> None:
        """Add a step: its loss summed over its `supervised` tokens, and all its tokens."""
        self.loss_sum += loss_sum
        self.line_supervised += supervised
        self.line_tokens += tokens
        self.supervised_tokens += supervised
        self.tokens += tokens

    def flush(self, seconds: float) -> dict[str, float]:
        """Return the figures of a log line that covers `seconds`, and start the next; loss is per supervised token."""
        figures = {
            "loss": self.loss_sum / max(1, self.line_supervised),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_second": round(self.line_tokens / max(seconds, 1e-9), 1),
        }
        self.loss_sum, self.line_supervised, self.line_tokens = 0.0, 0, 0
        return figures


@dataclass
class RandomState:
    """The states of the random generators of Python, NumPy and torch (CPU, and the current CUDA device if any)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @classmethod
    def current(cls) -> "RandomState":
        """Read the states; changes nothing."""
        numpy_state: Any = np.random.get_state()
        tensors = {
            **{f"random.{kind}": state for kind, state in random_states().items()},
            "random.numpy": torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)),
        }
        return cls(tensors, {"python": random.getstate(), "numpy": numpy_state[2:]})

    def restore(self) -> None:
        """Set the generators to these states."""
        version, words, gauss = self.values["python"]
        random.setstate((version, tuple(words), gauss))
        words = self.tensors["random.numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, *self.values["numpy"]))
        set_random_states({name.removeprefix("random."): state for name, state in self.tensors.items()})


@dataclass
class State:
    """The state of a run after `step` complete steps.

    tensors: `optimizer.<parameter>.<moment>`, `random.<generator>`, `base_rows.<set>.<metric>`, on the CPU. values: for JSON:
    step, trainer (TrainerState), groups (optimizer settings), scheduler, random, and the caller's.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @classmethod
    def take(cls, model: nn.Module, optimizer, scheduler, trainer: TrainerState, generators: RandomState) -> "State":
        """Copy the state of the objects that the Trainer holds."""
        names = {id(p): name for name, p in trainable(model).items()}
        tensors, groups = dict(generators.tensors), []
        for group in _inner(optimizer).param_groups:
            groups.append({k: v for k, v in group.items() if k != "params"})
            for p in group["params"]:
                for key, value in _inner(optimizer).state[p].items():
                    tensors[f"optimizer.{names[id(p)]}.{key}"] = torch.as_tensor(value).detach().cpu()
        values = {
            "step": trainer.global_step,
            "trainer": {k: v for k, v in asdict(trainer).items() if k not in ("log_history", "stateful_callbacks")},
            "groups": groups,
            "scheduler": scheduler.state_dict(),
            "random": generators.values,
        }
        return cls(trainer.global_step, tensors, values)

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def write(self, folder: Path) -> None:
        """Write both files into `folder`."""
        write_tensors(folder / TENSORS, self.tensors)
        write_json(folder / JSON, self.values)

    @classmethod
    def read(cls, folder: Path) -> "State":
        """Read the state of a checkpoint folder whose manifest has been verified; FilesError if it is not a run's state."""
        values = read_json(folder / JSON, FilesError)
        if not isinstance(values.get("step"), int):
            raise FilesError(f"{folder / JSON}: has no step, so it is not the state of a run.")
        return cls(values["step"], read_tensors(folder / TENSORS), values)

    def forget_best(self) -> None:
        """Let the next evaluation be the best so far."""
        self.values["trainer"] |= {"best_global_step": None, "best_metric": None}
        self.values.pop("best", None)

    def restore_optimizer(self, model: nn.Module, optimizer, scheduler) -> None:
        """Restore the optimizer's moments and settings, on the parameters' devices, and the schedule's position."""
        inner = _inner(optimizer)
        names = {id(p): name for name, p in trainable(model).items()}
        for group, settings in zip(inner.param_groups, self.values["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in settings.items()})
            for p in group["params"]:
                prefix = f"optimizer.{names[id(p)]}."
                moments = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
                # the 0-dim `step` belongs on the CPU, except in a fused optimizer on a GPU
                fused = bool(group.get("fused")) and p.device.type != "cpu"
                inner.state[p] = {k: v.to(p.device) if v.dim() or fused else v.clone() for k, v in moments.items()}
        scheduler.load_state_dict(self.values["scheduler"])
        for group, peak, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = peak * factor(scheduler.last_epoch)  # unchanged, unless the run is longer now

    def keep_base_rows(self, rows: RowsBySet) -> None:
        """Add the rows of the base's evaluation, so that a resumed run compares with them as before."""
        self.tensors |= {
            f"base_rows.{name}.{metric}": torch.from_numpy(np.ascontiguousarray(array))
            for name, of_set in rows.items()
            for metric, array in of_set.items()
        }

    def base_rows(self) -> RowsBySet:
        """What `keep_base_rows` has added; {} in a checkpoint of an earlier version."""
        rows: RowsBySet = {}
        for key, tensor in self.tensors.items():
            if key.startswith("base_rows."):
                name, _, metric = key.removeprefix("base_rows.").rpartition(".")
                rows.setdefault(name, {})[metric] = tensor.numpy()
        return rows

    def generators(self) -> RandomState:
        """The random generators' states at the start of the next step."""
        return RandomState({k: v for k, v in self.tensors.items() if k.startswith("random.")}, self.values["random"])


def _inner(optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def best_step(values: dict) -> int | None:
    """The step of the best checkpoint so far, of a State's values; None if there was no evaluation."""
    trainer = values.get("trainer")
    step = trainer.get("best_global_step") if isinstance(trainer, dict) else None
    return step if isinstance(step, int) else None


def is_intact(folder: Path) -> bool:
    """Whether all files of a checkpoint match its manifest."""
    try:
        verify_manifest(folder, read_json(folder / RECORD, FilesError)["files"], FilesError)
    except (FilesError, KeyError):
        return False
    return True
