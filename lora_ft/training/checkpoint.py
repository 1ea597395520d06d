"""What a checkpoint holds beside the adapter: everything a run needs to go on as if it had not stopped.

Tensors go to state.safetensors, the rest to state.json; no pickle. This room knows the objects' state, not the Trainer.
"""

import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_ft.core.errors import FilesError
from lora_ft.core.storage import read_json, read_tensors, write_json, write_tensors
from lora_ft.methods.lora.inject import trainable

TENSORS, JSON = "state.safetensors", "state.json"


@dataclass
class Counts:
    """Sums for the log: since the last line (loss_sum, line_supervised, line_tokens) and since the run began."""

    loss_sum: float = 0.0
    line_supervised: int = 0
    line_tokens: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def add(self, loss_sum: float, supervised: int, tokens: int) -> None:
        self.loss_sum += loss_sum
        self.line_supervised += supervised
        self.line_tokens += tokens
        self.supervised_tokens += supervised
        self.tokens += tokens

    def line(self, seconds: float) -> dict[str, float]:
        """The log's figures since the last line, which begin anew: loss is the mean over supervised tokens."""
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
    """The states of Python's, numpy's and torch's generators."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @classmethod
    def now(cls) -> "RandomState":
        version, words, gauss = random.getstate()
        numpy_state: Any = np.random.get_state()
        tensors = {
            "random.torch": torch.get_rng_state(),
            "random.numpy": torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)),
        }
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        return cls(tensors, {"python": [version, list(words), gauss], "numpy": list(numpy_state[2:])})

    def restore(self) -> None:
        version, words, gauss = self.values["python"]
        random.setstate((version, tuple(words), gauss))
        words = self.tensors["random.numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, *self.values["numpy"]))
        torch.set_rng_state(self.tensors["random.torch"])
        if torch.cuda.is_available() and "random.cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["random.cuda"])


@dataclass
class State:
    """A run's state after a whole step.

    tensors: the optimizer's and the generators'. values: what JSON can hold: step, trainer (its TrainerState), groups (the
    optimizer's settings), scheduler, random, and what the caller adds.
    """

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def take(cls, model: nn.Module, optimizer, scheduler, trainer_state, generators: RandomState) -> "State":
        names = {id(p): name for name, p in trainable(model).items()}
        tensors, groups = dict(generators.tensors), []
        for group in _inner(optimizer).param_groups:
            groups.append({k: v for k, v in group.items() if k != "params"})
            for p in group["params"]:
                for key, value in _inner(optimizer).state[p].items():
                    tensors[f"optimizer.{names[id(p)]}.{key}"] = torch.as_tensor(value).detach().cpu()
        values = {
            "step": trainer_state.global_step,
            "trainer": {
                k: v for k, v in asdict(trainer_state).items() if k not in ("log_history", "stateful_callbacks")
            },
            "groups": groups,
            "scheduler": scheduler.state_dict(),
            "random": generators.values,
        }
        return cls(trainer_state.global_step, tensors, values)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def write(self, folder: Path) -> None:
        write_tensors(folder / TENSORS, self.tensors)
        write_json(folder / JSON, self.values)

    @classmethod
    def read(cls, folder: Path) -> "State":
        """The state in a checkpoint folder whose manifest was verified.

        Raises:
            FilesError: it is of another format.
        """
        values = read_json(folder / JSON, FilesError)
        if not isinstance(values.get("step"), int):
            raise FilesError(f"{folder / JSON}: holds no step, so it is no state of a run.")
        return cls(values["step"], read_tensors(folder / TENSORS), values)

    def restore_optimizer(self, model: nn.Module, optimizer, scheduler) -> None:
        """Give optimizer and scheduler their moments, settings and place back, on the parameters' devices."""
        inner = _inner(optimizer)
        names = {id(p): name for name, p in trainable(model).items()}
        for group, settings in zip(inner.param_groups, self.values["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in settings.items()})
            for p in group["params"]:
                prefix = f"optimizer.{names[id(p)]}."
                moments = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
                # a 0-dim `step` stays where the optimizer wants it: on the CPU, unless fused on a GPU
                fused = bool(group.get("fused")) and p.is_cuda
                inner.state[p] = {k: v.to(p.device) if v.dim() or fused else v.clone() for k, v in moments.items()}

        scheduler.load_state_dict(self.values["scheduler"])
        for group, peak, share in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = peak * share(scheduler.last_epoch)  # as before, or what a longer run's schedule says here

    def generators(self) -> RandomState:
        return RandomState({k: v for k, v in self.tensors.items() if k.startswith("random.")}, self.values["random"])


def _inner(optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
