"""SIGTERM and SIGINT: stop at a place from which the run can go on exactly; a second one ends at once."""

import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS = 8  # that a stop may take where nothing has to be saved
ONE_SIGNAL = 1.0  # seconds within which a launcher and the terminal may both deliver what the user sent once


class Stopped(BaseException):
    """A signal's request to stop. Not an Exception: nothing on the way may take it for an error and go on."""

    def __init__(self, signum: int, hint: str = ""):
        super().__init__("stopped")
        self.exit_code, self.hint = 128 + signum, hint

    def __str__(self) -> str:
        return ". ".join(part for part in (*self.args, self.hint) if part)


class Stopper:
    """Turns a signal into `Stopped`: at once, or while `deferred` at the next `check`.

    Use as a context manager in the main thread; the handlers that were there before come back at the end. Libraries may
    take `Stopped` for an error of theirs (an import that failed), or lose it (in a callback from C): an error that comes
    after a signal that was not deferred leaves as `Stopped`, and a process that goes on all the same is ended soon.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received: int | None = None
        self._since = 0.0
        self.hint = ""  # what is said after "stopped"
        self._last_resort: threading.Timer | None = None

    def __enter__(self) -> "Stopper":
        self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._last_resort is not None:
            self._last_resort.cancel()
            if self.received is not None and isinstance(error, Exception):
                raise Stopped(self.received, self.hint) from error

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.received is not None:
            raise Stopped(self.received, self.hint)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if "LOCAL_RANK" in os.environ and time.monotonic() - self._since < ONE_SIGNAL:
                return
            os._exit(128 + signum)
        self.received, self._since = signum, time.monotonic()
        if not self.deferred:
            self._last_resort = threading.Timer(SECONDS, os._exit, [128 + signum])
            self._last_resort.daemon = True
            self._last_resort.start()
            raise Stopped(signum, self.hint)
