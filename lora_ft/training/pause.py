"""Stopping a run before its end, as `lora-ft train --until` asks: it can be resumed as if it had never stopped."""

import math

from transformers import TrainerCallback


def last_step(until: float | None, steps: int) -> int:
    """The step to stop after, of a run of `steps`; until: a number of steps, or below 1 a part of the run."""
    if until is None:
        return steps
    return min(steps, math.ceil(until * steps) if until < 1 else int(until))


class Pause(TrainerCallback):
    """Saves after step `last` and ends training there. evaluates: before that, as tuning needs it."""

    def __init__(self, last: int, evaluates: bool):
        self.last, self.evaluates = last, evaluates

    def on_epoch_begin(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.last  # an owed evaluation was all that was left

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= self.last:
            control.should_save = control.should_training_stop = True
            control.should_evaluate |= self.evaluates
