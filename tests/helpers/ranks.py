"""Several processes of a run as forks of this one, which has imported everything: with a launcher of ours, or without one."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from lora_ft.distributed import launch
from tests.helpers.command import Started, main, start


def ranks(count: int, work: Callable[[], object]) -> list[int]:
    """Call `work` in `count` forks that find in their environment what torchrun would have put there; their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({k: str(v) for k, v in own.items()}, MASTER_ADDR="localhost", MASTER_PORT=str(port))
            torch.set_num_threads(1)
            AcceleratorState._reset_state(reset_partial_state=True)  # what earlier tests left in this process
            work()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def train(folder: Path, count: int, *settings: str, flags: tuple[str, ...] = ()) -> str:
    """`lora-ft train config.yaml` in `folder` as `count` processes; see `command`."""
    return command(folder, count, "train", "config.yaml", *(w for s in settings for w in ("--set", s)), *flags)


def command(folder: Path, count: int, *words: str) -> str:
    """`lora-ft WORDS` in `folder` as `count` processes that must end well; all that they said."""

    def work() -> None:
        import sys

        os.chdir(folder)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        sys.argv = ["lora-ft", *words]
        main()

    (folder / "said.txt").unlink(missing_ok=True)
    codes = ranks(count, work)
    said = (folder / "said.txt").read_text()
    assert codes == [0] * count, said
    return said


def launched(folder: Path, *words: str, before: Callable[[], object] = lambda: None) -> Started:
    """`lora-ft WORDS --processes N` in a fork, which starts its processes as forks too. `before` is called in the launcher."""

    def arm() -> None:
        settings = launch.LaunchConfig
        launch.LaunchConfig = lambda **given: settings(**given | {"start_method": "fork"})
        AcceleratorState._reset_state(reset_partial_state=True)
        before()

    return start(folder, *words, before=arm)
