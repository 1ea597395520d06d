"""The thread that the engine runs in."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from lora_ft.commands.serve.engine import Engine


def started(make: Callable[[], Engine]) -> Engine:
    """The engine that `make` returns, running in the thread that called `make`, in which its model is to be loaded.

    OpenMP's threads belong to the thread that computes. Where a second one does, they are more than there are cores, and each
    product waits for the system to wake them: a step takes twice as long.
    """
    made: Future[Engine] = Future()

    def thread() -> None:
        try:
            engine = make()
        except BaseException as e:  # noqa: BLE001 (the caller's)
            made.set_exception(e)
            return
        made.set_result(engine)
        engine.run()

    threading.Thread(target=thread, name="engine", daemon=True).start()
    return made.result()
