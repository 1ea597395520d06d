"""The members of transformers' Trainer and accelerate's Accelerator that LoRATrainer replaces beyond their documented use.

Everything else goes through overridable methods, callbacks and control flags. tests/training/test_trainer_seam.py has one test
per member and one for the order of events, so that a release that changes any of them fails a test with its name.
"""

import torch
from transformers import Trainer


class SeamTrainer(Trainer):
    """A Trainer that neither moves nor wraps the model, and leaves checkpoints to `save_checkpoint`."""

    def save_checkpoint(self) -> None:
        """Save the state after the last step."""
        raise NotImplementedError

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Called when `control.should_save` is set. The Trainer's own writes pickles in place, and rotates by file name."""
        self.save_checkpoint()

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Do nothing: the model was loaded where it computes, and a sharded one cannot be moved."""

    def create_accelerator_and_postprocess(self) -> None:
        """Keep DistributedDataParallel off the model: `training_step` sums the gradients. Autocast stays.

        As training begins, the Trainer frees what an earlier one left in the accelerator, with a walk through all objects of
        the process, a third of a second. This one has had none.
        """
        super().create_accelerator_and_postprocess()
        self.accelerator.free_memory = lambda: None
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)
