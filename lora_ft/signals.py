"""SIGTERM and SIGINT: stop at a place from which the run can go on exactly; a second one ends at once."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal's request to stop. Not an Exception: nothing on the way may take it for an error and go on."""

    def __init__(self, signum: int, message: str = "stopped"):
        super().__init__(message)
        self.exit_code = 128 + signum


class Stopper:
    """Turns a signal into `Stopped`: at once, or while `deferred` at the next `check`.

    Use as a context manager in the main thread; the handlers that were there before come back at the end.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received: int | None = None

    def __enter__(self) -> "Stopper":
        self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
        if not self.deferred:
            raise Stopped(signum)
