"""The entry point of `lora-ft` and of `python -m lora_ft`."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback also while it is imported, before a command handles signals."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, lambda signum, _: os._exit(128 + signum))
    from lora_ft.cli import main as run

    run()


if __name__ == "__main__":
    main()
