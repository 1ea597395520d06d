"""What a person reads while a command runs: in a job's log, through a pipe, with and without eval data."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.command import cli, train


def test_a_run_without_eval_data_leaves_lines_in_a_jobs_log(fresh):
    ended = train(fresh, "data.eval=null", "train.logging_steps=1", "train.max_steps=20")
    steps = re.findall(r"^step (\d+) of 20: loss [\d.]+, \d+ tokens/s, \d\d:\d\d left$", ended.err, re.MULTILINE)
    assert ended.code == 0 and steps == [str(n) for n in range(2, 21, 2)], ended
    assert ended.out == "out\n"


def test_early_stopping_is_told(fresh):
    ended = train(fresh, "train.learning_rate=1e-30", "train.eval_steps=2", "train.early_stopping_patience=2")
    assert ended.code == 0 and "stopped early at step 6: no improvement in the last 2 evaluations" in ended.err, ended
    assert "stopped early" not in train(fresh, "output=other").err


KEPT = []


def close_stdout() -> None:
    """As if `head` had read enough and gone."""
    reader, writer = os.pipe()
    os.close(reader)
    KEPT.append(sys.stdout)  # it owns the descriptor that is taken here
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w")


@pytest.mark.parametrize("command", [("eval",), ("eval", "--json"), ("check", "config.yaml")])
def test_a_reader_that_has_had_enough(folder, command):
    ended = cli(folder, *command, before=close_stdout)
    assert ended.code == 141 and "rror" not in ended.err, ended


def test_the_bars_of_libraries_are_off_without_a_terminal():
    """GGUF files are read with a bar of plain tqdm; a bar of ours asks for a terminal itself."""
    code = (
        "from lora_ft.core.messages import silence_libraries; silence_libraries(); "
        "from tqdm.auto import tqdm; list(tqdm(range(3)))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
