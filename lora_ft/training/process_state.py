"""What a process has only one of, kept for each of several runs."""

import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch

from lora_ft.core import messages
from lora_ft.core.signals import Stopper
from lora_ft.training.checkpoint import RandomState

TENSORBOARD = "TENSORBOARD_LOGGING_DIR"  # set for the Trainer by training/arguments.py


@dataclass
class ProcessState:
    """What belongs to one run at a time, though a process has only one of it."""

    random: RandomState
    stdout: Any
    thread_hook: Any
    tensorboard: str | None
    stop: tuple[bool, str]
    prefix: str
    gradients: bool

    @classmethod
    def current(cls, stopper: Stopper) -> "ProcessState":
        """As it is now."""
        stop = stopper.deferred, stopper.hint
        hook, folder = threading.excepthook, os.environ.get(TENSORBOARD)
        own = hook, folder, stop, messages.prefix(), torch.is_grad_enabled()
        return cls(RandomState.current(), sys.stdout, *own)

    def restore(self, stopper: Stopper) -> None:
        """Make it so again."""
        self.random.restore()
        sys.stdout, threading.excepthook = self.stdout, self.thread_hook
        stopper.deferred, stopper.hint = self.stop
        messages.set_prefix(self.prefix)
        torch.set_grad_enabled(self.gradients)
        if self.tensorboard is not None:
            os.environ[TENSORBOARD] = self.tensorboard
