"""Writing a run to disk: its checkpoints, and the adapter at its end."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError
from lora_ft.core.messages import warn
from lora_ft.core.storage import atomic_folder, read_json, require_space, verify_manifest, write_file
from lora_ft.methods.interface import METHODS
from lora_ft.methods.lora.files import write_record
from lora_ft.methods.lora.inject import trainable
from lora_ft.methods.model_card import CARD, model_card
from lora_ft.methods.trained import Trained
from lora_ft.training import checkpoint
from lora_ft.training.output import log_size, rotate

SMALL_FILES = 2**20  # bytes at most for record, card and configs


@dataclass
class Saver:
    """Writes checkpoints and the final adapter of a run.

    Attributes:
        evaluations: step -> metrics; of earlier processes only those of the best step.
    """

    output: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    record: dict
    save_total_limit: int | None
    evaluations: dict[int, dict] = field(default_factory=dict)

    def save(self, state: checkpoint.State, best_step: int | None) -> None:
        """Write the checkpoint of a step, verify it by reading it back, then remove older ones.

        Raises:
            FilesError: no space, or what was written reads back differently.
        """
        folder = run_folder.checkpoint_of(self.output, state.step)
        if folder.exists():
            if is_intact(folder):
                return  # an interruption wrote it, and the run reached the same step again: the same bits
            warn(f"checkpoint {folder} is damaged; renamed to {set_aside(folder)}")
        require_space(
            self.output, state.bytes + 4 * sum(p.numel() for p in trainable(self.model).values()) + SMALL_FILES
        )
        if best_step in self.evaluations:
            state.values["best"] = {"step": best_step, "metrics": self.evaluations[best_step]}
        state.values["log_size"] = log_size(self.output)
        facts = {"kind": "checkpoint", "step": state.step, "metrics": self.evaluations.get(state.step, {})}
        with atomic_folder(folder) as staged:
            state.write(staged)
            self._write(staged, facts, [checkpoint.TENSORS, checkpoint.JSON])
        if not is_intact(folder):
            raise FilesError(
                f"{folder}: what was written reads back differently; is the disk failing? Older checkpoints were kept."
            )
        self.rotate(state.step, best_step)

    def continue_from(self, state: checkpoint.State) -> None:
        """Take over the best evaluation of a resumed run, and finish a rotation that was interrupted."""
        if best := state.values.get("best"):
            self.evaluations[best["step"]] = best["metrics"]
        self.rotate(state.step, state.values["trainer"]["best_global_step"])

    def rotate(self, step: int, best_step: int | None) -> None:
        """Remove the oldest checkpoints beyond the limit, but never the best one or those from `step` on."""
        rotate(self.output, self.save_total_limit, {step} | ({best_step} if best_step else set()))

    def load_best(self, step: int, last: int) -> dict:
        """Put the adapter of `step` into the model, if it is not the `last` one. Returns the record's closing facts."""
        if step != last:
            best = Trained.open(run_folder.checkpoint_of(self.output, step))
            METHODS[best.method].load_into(self.model, best)
        return {"kind": "adapter", "step": step, "steps": last, "metrics": self.evaluations.get(step, {})}

    def finish(self, result: dict) -> None:
        """Write the adapter into the output folder, its record last, with `result` in it."""
        (self.output / run_folder.RECORD).unlink(missing_ok=True)  # of a run that was made longer
        self._write(self.output, result, mentions=[n for n in run_folder.UNHASHED if (self.output / n).exists()])

    def _write(self, folder: Path, facts: dict, state: Sequence[str] = (), mentions: Sequence[str] = ()) -> None:
        """Write what was trained and its card, the record last; its manifest covers the `state` files in the folder."""
        method, base = self.record["config"]["adapter"]["method"], self.record["base"]["name"]
        files, more = METHODS[method].save(self.model, folder, base, self.tokenizer)
        record = self.record | facts | more
        write_file(folder / CARD, model_card(record))
        write_record(folder, record, [*files, *state], [CARD, *mentions])


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that a new one can have its name. Returns the new path."""
    for n in itertools.count(1):
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{n}")
        if not aside.exists():
            checkpoint.rename(aside)
            return aside
    raise AssertionError


def is_intact(folder: Path) -> bool:
    """Whether all files of a checkpoint match its manifest."""
    try:
        verify_manifest(folder, read_json(folder / run_folder.RECORD, FilesError)["files"], FilesError)
    except (FilesError, KeyError):
        return False
    return True
