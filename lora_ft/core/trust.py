"""What a command line allows beyond what is always safe."""

from typing import NamedTuple


class Trust(NamedTuple):
    """Permissions, each given by an option of the command line.

    Attributes:
        remote_code: run Python code that comes with a model (`--trust-remote-code`).
        pickles: read pickled weights through torch's weights_only loader (`--allow-pickle`).
        other_base: use an adapter on a base it was not trained on, with a warning (`--other-base`).
    """

    remote_code: bool = False
    pickles: bool = False
    other_base: bool = False


NO_TRUST = Trust()
