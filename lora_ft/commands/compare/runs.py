"""The runs of a comparison, each by `lora-ft train --resume` in its own process. Imports no torch.

All state is in the runs' folders: a comparison that was stopped resumes when the same command is given again. A finished
run with the same settings is reused, an unfinished one resumes from its newest checkpoint.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.config.learning_rate import chosen_before
from lora_ft.config.schema import Config
from lora_ft.config.together import shared_values
from lora_ft.config.tuning import refuse_other_settings
from lora_ft.core.disk import WINDOWS
from lora_ft.core.errors import EXIT_INTERRUPTED, EXIT_OUT_OF_MEMORY, ModelError, NumbersError
from lora_ft.core.messages import info, working
from lora_ft.core.run_folder import newest_record
from lora_ft.core.signals import Stopped
from lora_ft.core.storage import write_file
from lora_ft.report.figures import config_text

# The variant does not fit the model, its numbers overflow, or it needs too much memory: it is left out of the comparison.
SKIPPED_EXIT_CODES = (ModelError.exit_code, NumbersError.exit_code, EXIT_OUT_OF_MEMORY)

TOGETHER = 8  # runs that are trained together at most: each adds its adapter and optimizer to the memory
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class RunFailed(Exception):
    """A run ended with one of SKIPPED_EXIT_CODES; the message is its own."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Runner:
    """Trains the runs of the comparison in `folder`. options: of `lora-ft train`. total: the number of runs to expect."""

    folder: Path
    options: Sequence[str]
    total: int
    begun: set[str] = field(default_factory=set)  # the outputs of runs so far

    def train(self, title: str, config: Config, until: float | None = None) -> dict:
        """Train `config` to its end, unless its output holds that run already; returns the run's record.

        until: as for `lora-ft train`; the record is then that of the last checkpoint.

        Raises:
            RunFailed: the variant does not fit the model or the memory, or its numbers overflow.
            ConfigError: the output holds a run with other settings, which are listed.
            SystemExit: the run failed otherwise, or was stopped; with its exit code.
        """
        self.begun |= {config.output}
        info(f"compare: run {len(self.begun)} of {self.total}: {title}")
        if record := newest_record(Path(config.output)):
            refuse_other_settings(Path(config.output), record["config"], chosen_before(config, record))
            if record["kind"] == "adapter":
                return record
        with working(f"run {len(self.begun)} of {self.total}"):
            exit_code, last_line = run_and_stream(self._command([config], until))
        if exit_code in SKIPPED_EXIT_CODES:
            raise RunFailed(last_line, exit_code)
        if exit_code:
            info(
                f"compare: the run in {config.output} failed with exit code {exit_code}; repeat the command to resume it"
            )
            raise SystemExit(exit_code)
        record = newest_record(Path(config.output))
        assert record is not None, "a run that succeeded has a record"
        return record

    def train_together(self, configs: Sequence[Config], until: float | None = None) -> None:
        """Train those of `configs` that can be trained together so, up to TOGETHER at a time; the others are left to `train`.

        So are those that fail here: `train` finds what there is of each run, and says what became of it. Raises SystemExit if
        they were stopped.
        """
        groups: dict[tuple, list[Config]] = {}
        for config in configs:
            record = newest_record(Path(config.output))
            if config.adapter.method == "lora" and not (record and record["kind"] == "adapter"):
                groups.setdefault(shared_values(config), []).append(config)
        for group in groups.values():
            for some in (group[i : i + TOGETHER] for i in range(0, len(group), TOGETHER)):
                if len(some) > 1:
                    info(f"compare: training {len(some)} runs together (--one-by-one trains each alone)")
                    with working(f"{len(some)} runs"):
                        exit_code, _ = run_and_stream(self._command(some, until))
                    if exit_code >= EXIT_INTERRUPTED:
                        raise SystemExit(exit_code)

    def _command(self, configs: Sequence[Config], until: float | None) -> list[str]:
        """The command that trains `configs`, whose files are kept, so that runs can be repeated by hand."""
        paths = []
        for config in configs:
            name = Path(config.output).relative_to(self.folder).as_posix().replace("/", "-")
            paths.append(self.folder / "configs" / f"{name}.yaml")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            write_file(paths[-1], config_text(config.model_dump(mode="json")))
        stop = ["--until", str(until)] if until else []
        return [sys.executable, "-m", "lora_ft", "train", *map(str, paths), "--resume", *stop, *self.options]


def run_and_stream(command: list[str]) -> tuple[int, str]:
    """Run a command with its messages indented on stderr; returns its exit code and the last line of them.

    The command has its own process group, out of reach of Ctrl-C: a signal to this process is passed on once. Windows has
    no such groups: there Ctrl-C reaches both. If this process is killed, Linux ends the command with SIGTERM, so that it
    saves its last step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        process_group=0,
        preexec_fn=(lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)) if libc else None,
    )
    assert child.stderr is not None
    last_line, shown = "", True
    try:
        for line in child.stderr:
            shown = shown and not line.startswith("next:")  # the last lines of a run: what to do with its adapter alone
            if shown:
                info(f"  {line.rstrip()}")
            last_line = line.strip()  # of a failed run, the error
        exit_code = child.wait()
    except Stopped as stop:
        if not WINDOWS:
            child.send_signal(stop.exit_code - 128)
        child.wait()
        raise
    return exit_code, last_line
