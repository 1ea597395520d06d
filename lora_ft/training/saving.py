"""Writing a run to disk: its checkpoints, and the adapter at its end."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_ft.core import run_folder
from lora_ft.core.disk import rename
from lora_ft.core.errors import FilesError
from lora_ft.core.messages import warn
from lora_ft.core.storage import atomic_folder, require_space, write_file, write_json
from lora_ft.distributed import processes
from lora_ft.methods.interface import METHODS
from lora_ft.methods.lora.files import write_record
from lora_ft.methods.lora.inject import trainable
from lora_ft.methods.model_card import CARD, model_card
from lora_ft.methods.trained import Trained
from lora_ft.training import checkpoint
from lora_ft.training.checkpoint import RowsBySet, is_intact
from lora_ft.training.output import log_size, rotate
from lora_ft.training.setup import RunSetup

SMALL_FILES = 2**20  # bytes at most for record, card and configs


class Saver:
    """Writes checkpoints and the final adapter of a run, and keeps the metrics that belong to them.

    record: the run's before the first step. evaluate: returns the metrics of the model as it is. base_rows: see `State`.
    """

    def __init__(self, output: Path, setup: RunSetup, record: dict, evaluate: Callable[[], dict], base_rows: RowsBySet):
        self.output, self.record, self.compute_metrics, self.base_rows = output, record, evaluate, base_rows
        self.model, self.tokenizer, self.row_tokens = setup.model, setup.tokenizer, setup.row_tokens
        self.chat_template = setup.chat_template
        self.save_total_limit = setup.config.train.save_total_limit
        self.evaluations: dict[int, dict] = {}  # step -> metrics; of earlier processes only those of the best step
        if setup.state:
            if best := setup.state.values.get("best"):
                self.evaluations[best["step"]] = best["metrics"]
            if processes.is_main():  # a rotation may have been interrupted
                self.rotate(setup.state.step, setup.state.values["trainer"]["best_global_step"])

    def evaluate(self, step: int) -> dict:
        """The metrics of the model after a step, which its checkpoint will have."""
        self.evaluations[step] = self.compute_metrics()
        return self.evaluations[step]

    def save(self, state: checkpoint.State, best_step: int | None) -> None:
        """Write the checkpoint of a step (on the main process), verify it by reading it back, then remove older ones.

        Raises:
            FilesError: no space, or what was written reads back differently.
        """
        if not processes.is_main():
            return
        folder = run_folder.checkpoint_of(self.output, state.step)
        if folder.exists():
            if is_intact(folder):  # an interruption wrote it, and the run reached the same step again: the same bits
                self._add_metrics(folder, state.step)
                return
            warn(f"checkpoint {folder} is damaged; renamed to {set_aside(folder)}")
        state.keep_base_rows(self.base_rows)
        trained = 4 * sum(p.numel() for p in trainable(self.model).values())
        require_space(self.output, state.bytes + trained + SMALL_FILES)
        if best_step in self.evaluations:
            state.values["best"] = {"step": best_step, "metrics": self.evaluations[best_step]}
        state.values |= {"log_size": log_size(self.output), "micro_batch_tokens": self.row_tokens}
        facts = {"kind": "checkpoint", "step": state.step, "metrics": self.evaluations.get(state.step, {})}
        with atomic_folder(folder) as staged:
            state.write(staged)
            self._write(staged, facts, [checkpoint.TENSORS, checkpoint.JSON])
        if not is_intact(folder):
            raise FilesError(
                f"{folder}: what was written reads back differently; is the disk failing? Older checkpoints were kept."
            )
        self.rotate(state.step, best_step)

    def _add_metrics(self, folder: Path, step: int) -> None:
        """Add to a checkpoint's record the metrics that an interrupted evaluation left owing."""
        record = run_folder.read_record(folder, FilesError)
        if record and step in self.evaluations and not record["metrics"]:
            write_json(folder / run_folder.RECORD, record | {"metrics": self.evaluations[step]})

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
        if self.chat_template:
            write_file(folder / run_folder.TEMPLATE, self.chat_template)
            files = [*dict.fromkeys([*files, run_folder.TEMPLATE])]
        record = self.record | facts | more
        write_file(folder / CARD, model_card(record))
        write_record(folder, record, [*files, *state], [CARD, *mentions])


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that a new one can have its name. Returns the new path."""
    names = (checkpoint.with_name(f"{checkpoint.name}.damaged-{n}") for n in itertools.count(1))
    return rename(checkpoint, next(path for path in names if not path.exists()))
