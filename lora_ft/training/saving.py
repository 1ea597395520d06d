"""What a run leaves on disk: checkpoints on the way, the adapter at its end."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError
from lora_ft.core.storage import read_json, require_space, staged_folder, verify_manifest, write_file
from lora_ft.methods import interface
from lora_ft.methods.lora.files import write_record
from lora_ft.methods.lora.inject import trainable
from lora_ft.methods.model_card import model_card
from lora_ft.methods.trained import Trained
from lora_ft.training import checkpoint, run_log

CARD = "README.md"
SMALL_FILES = 2**20  # bytes that a record, card and configs take at most


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
        """Write the checkpoint of a step, check it by reading it back, then let older ones go."""
        folder = run_folder.checkpoint_of(self.output, state.step)
        if folder.exists():
            if is_intact(folder):
                return  # an interruption wrote it, and the run came back to the same step: the same bits
            print(f"checkpoint {folder} is damaged; it is now {put_aside(folder)}", file=sys.stderr)
        require_space(
            self.output, state.bytes + 4 * sum(p.numel() for p in trainable(self.model).values()) + SMALL_FILES
        )
        if best_step in self.evaluations:
            state.values["best"] = {"step": best_step, "metrics": self.evaluations[best_step]}
        state.values["log_size"] = run_log.size(self.output)
        about = {"kind": "checkpoint", "step": state.step, "metrics": self.evaluations.get(state.step, {})}
        with staged_folder(folder) as staged:
            state.write(staged)
            self._write(staged, about, [checkpoint.TENSORS, checkpoint.JSON])
        if not is_intact(folder):
            raise FilesError(
                f"{folder}: what was written reads back otherwise. Is the disk in order? Older ones were kept."
            )
        self.rotate(state.step, best_step)

    def continue_from(self, state: checkpoint.State) -> None:
        """Take over the best evaluation of a resumed run, and finish a rotation that was interrupted."""
        if best := state.values.get("best"):
            self.evaluations[best["step"]] = best["metrics"]
        self.rotate(state.step, state.values["trainer"]["best_global_step"])

    def rotate(self, step: int, best_step: int | None) -> None:
        """Let checkpoints older than `step` go, but for the best."""
        run_folder.rotate(self.output, self.save_total_limit, {step} | ({best_step} if best_step else set()))

    def load_best(self, step: int, last: int) -> dict:
        """Put the adapter of `step` into the model, if it is not the `last` one. Returns the record's closing facts."""
        if step != last:
            interface.load_into(self.model, Trained.open(run_folder.checkpoint_of(self.output, step)))
        return {"kind": "adapter", "step": step, "steps": last, "metrics": self.evaluations.get(step, {})}

    def finish(self, result: dict) -> None:
        """Write the adapter into the output folder, its record last, with `result` in it."""
        (self.output / run_folder.RECORD).unlink(missing_ok=True)  # of a run that was made longer
        self._write(self.output, result, mentions=[n for n in run_folder.MENTIONED if (self.output / n).exists()])

    def _write(self, folder: Path, about: dict, state: Sequence[str] = (), mentions: Sequence[str] = ()) -> None:
        """Write what was trained and its card, the record last; its manifest covers the `state` files that are there."""
        method, base = self.record["config"]["adapter"]["method"], self.record["base"]["name"]
        files, more = interface.save(method, self.model, folder, base, self.tokenizer)
        record = self.record | about | more
        write_file(folder / CARD, model_card(record))
        write_record(folder, record, [*files, *state], [CARD, *mentions])


def put_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that a new one can take its name."""
    for n in itertools.count(1):
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{n}")
        if not aside.exists():
            checkpoint.rename(aside)
            return aside
    raise AssertionError


def is_intact(folder: Path) -> bool:
    """Whether a checkpoint's files are all as its manifest says."""
    try:
        verify_manifest(folder, read_json(folder / run_folder.RECORD, FilesError)["files"], FilesError)
    except (FilesError, KeyError):
        return False
    return True
