"""SIGTERM, SIGINT and a closed window of Windows: stop where the run can resume exactly; a second signal exits at once."""

import os
import signal
import threading
import time
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name))
EXIT_SECONDS = 8  # time to unwind after a signal when there is nothing to save; then the process exits
DUPLICATE_SECONDS = 1.0  # a launcher and the terminal may both deliver one Ctrl-C, this far apart at most


class Stopped(BaseException):
    """A stop requested by a signal. Not an Exception, so that no `except Exception` on the way swallows it."""

    def __init__(self, signum: int, hint: str = ""):
        super().__init__("stopped")
        self.exit_code, self.hint = 128 + signum, hint

    def __str__(self) -> str:
        return ". ".join(part for part in (*self.args, self.hint) if part)


class Stopper:
    """Context manager of the main thread that turns signals into `Stopped`; the previous handlers return at its exit.

    A signal raises at once, or while `deferred` at the next `check`. Libraries may mistake `Stopped` for an error of
    their own (a failed import) or swallow it (in a C callback). So an exception that follows a signal leaves as
    `Stopped`, and a process still running EXIT_SECONDS later is ended.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received: int | None = None
        self._received_at = 0.0
        self.hint = ""  # printed after "stopped"
        self._last_resort: threading.Timer | None = None

    def __enter__(self) -> "Stopper":
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self._last_resort is not None:
            self._last_resort.cancel()
            if self.received is not None and isinstance(error, Exception):
                raise Stopped(self.received, self.hint) from error

    def check(self) -> None:
        """Stop here, by raising `Stopped`, if a signal was received."""
        if self.received is not None:
            raise Stopped(self.received, self.hint)

    def keep_running(self) -> None:
        """Cancel the exit after EXIT_SECONDS: there is something else to save."""
        if self._last_resort is not None:
            self._last_resort.cancel()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if "LOCAL_RANK" in os.environ and time.monotonic() - self._received_at < DUPLICATE_SECONDS:
                return
            os._exit(128 + signum)
        self.received, self._received_at = signum, time.monotonic()
        if not self.deferred:
            self._last_resort = threading.Timer(EXIT_SECONDS, os._exit, [128 + signum])
            self._last_resort.daemon = True
            self._last_resort.start()
            raise Stopped(signum, self.hint)
