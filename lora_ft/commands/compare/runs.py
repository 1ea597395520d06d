"""Training a comparison's runs, each by `lora-ft train --resume` in a process of its own. Imports no torch.

What there is to know of a run is in its folder, so a comparison that was stopped goes on by being asked again: a finished
run with the same settings is taken as it is, another goes on from its newest checkpoint.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_ft.config.load import Config, changes
from lora_ft.core.errors import EXIT_OUT_OF_MEMORY, ConfigError, FilesError, ModelError, NumbersError
from lora_ft.core.messages import info
from lora_ft.core.run_folder import RECORD, checkpoints
from lora_ft.core.signals import Stopped
from lora_ft.core.storage import read_json, write_file

# the variant does not fit this model, its numbers overflow, or it needs too much memory
REFUSED = (ModelError.exit_code, NumbersError.exit_code, EXIT_OUT_OF_MEMORY)


class Refused(Exception):
    """A run that can't be done here; message and exit code are its own."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def record_of(output: Path) -> dict | None:
    """The record of a finished run, else of an unfinished one's newest checkpoint; their `kind` tells."""
    for folder in (output, *reversed(checkpoints(output))):
        if (folder / RECORD).is_file():
            return read_json(folder / RECORD, FilesError)
    return None


@dataclass
class Runner:
    """Trains the runs of the comparison in `folder`; options: of `lora-ft train`, passed on. total: of runs to be asked for."""

    folder: Path
    options: Sequence[str]
    total: int
    begun: int = 0

    def run(self, what: str, config: Config) -> dict:
        """Train `config` to its end, or take what its output holds of the same settings; the run's record.

        Raises:
            Refused: the variant doesn't fit the model, or memory, or its numbers overflow.
            ConfigError: the output holds a run of other settings.
            SystemExit: it failed otherwise, or was stopped, with its own code.
        """
        self.begun += 1
        info(f"compare: run {self.begun} of {self.total}: {what}")
        output = Path(config.output)
        record = record_of(output)
        if record:
            check_same(output, record, config)
            if record["kind"] == "adapter":
                return record
        # kept, so that it can be run again by hand
        path = self.folder / "configs" / f"{output.relative_to(self.folder).as_posix().replace('/', '-')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        code, told = follow([sys.executable, "-m", "lora_ft", "train", str(path), "--resume", *self.options])
        if code in REFUSED:
            raise Refused(told, code)
        if code:
            info(f"compare: the run in {output} ended with exit code {code}; the same command goes on from there")
            raise SystemExit(code)
        record = record_of(output)
        assert record is not None, "a run that ended well leaves its record"
        return record


def check_same(output: Path, record: dict, config: Config) -> None:
    """Raises ConfigError, each setting named, where going on with a run would not give that of `config`."""
    found = changes(record["config"], config)
    if differ := found["result"] + found["longer"]:
        lines = "\n".join(f"  {line}" for line in differ)
        raise ConfigError(
            f"{output}: holds a run of other settings:\n{lines}\nSet them back, or name another folder: --output DIR."
        )


def follow(command: list[str]) -> tuple[int, str]:
    """Run a command, its messages indented on stderr: (exit code, the last of what it said).

    A signal to this process goes on to it, once: it has a process group of its own, where Ctrl-C doesn't reach it.
    """
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0
    )
    assert child.stderr is not None
    last = ""
    try:
        for line in child.stderr:
            info(f"  {line.rstrip()}")
            last = line.strip()  # of a run that failed, the error
        code = child.wait()
    except Stopped as stop:
        child.send_signal(stop.exit_code - 128)
        child.wait()
        raise
    return code, last
