"""What a command line allows beyond what is always safe."""

from typing import NamedTuple


class Trust(NamedTuple):
    """Permissions, each given by an option of the command line."""

    remote_code: bool = False  # run Python code that comes with a model (`--trust-remote-code`)
    pickles: bool = False  # read pickled weights through torch's weights_only loader (`--allow-pickle`)
    other_base: bool = False  # use an adapter on a base it was not trained on, with a warning (`--other-base`)

    def options(self) -> list[str]:
        """The options that give these permissions."""
        flags = {
            "--trust-remote-code": self.remote_code,
            "--allow-pickle": self.pickles,
            "--other-base": self.other_base,
        }
        return [flag for flag, given in flags.items() if given]


NO_TRUST = Trust()
