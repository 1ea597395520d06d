"""A short `make kill-test`: a run killed in the middle of writes and at random moments ends in the same bits."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/kill_test.py"


def test_a_killed_and_resumed_run_ends_in_the_same_bits():
    done = subprocess.run([sys.executable, SCRIPT, "-n", "8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: 8 kills" in done.stdout
