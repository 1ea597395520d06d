"""What a checkpoint holds beside the adapter: everything a run needs to go on as if it had not stopped.

Tensors go to state.safetensors, the rest to state.json; no pickle. This room knows the objects' state, not the Trainer.
"""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_ft.adapter.inject import trainable

TENSORS, JSON = "state.safetensors", "state.json"


@dataclass
class Counts:
    """Sums for the log: since the last line (loss_sum, supervised, steps' tokens) and since the run began."""

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
class State:
    """A run's state at the end of a step."""

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def take(cls, model: nn.Module, optimizer, scheduler, trainer_state, counts: Counts, early_stopping) -> "State":
        state = cls(trainer_state.global_step)
        names = {id(p): name for name, p in trainable(model).items()}
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        groups = []
        for group in inner.param_groups:
            groups.append({k: v for k, v in group.items() if k != "params"})
            for p in group["params"]:
                for key, value in inner.state[p].items():
                    state.tensors[f"optimizer.{names[id(p)]}.{key}"] = torch.as_tensor(value).detach().cpu()
        numpy_state: Any = np.random.get_state()
        state.tensors["random.torch"] = torch.get_rng_state()
        state.tensors["random.numpy"] = torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64))
        if torch.cuda.is_available():
            state.tensors["random.cuda"] = torch.cuda.get_rng_state()
        version, words, gauss = random.getstate()
        trainer = {k: v for k, v in asdict(trainer_state).items() if k != "log_history"}
        state.values = {
            "step": state.step,
            "trainer": trainer,
            "groups": groups,
            "scheduler": scheduler.state_dict(),
            "counts": asdict(counts),
            "random": {"python": [version, list(words), gauss], "numpy": list(numpy_state[2:])},
            "early_stopping": early_stopping.early_stopping_patience_counter if early_stopping else None,
        }
        return state
