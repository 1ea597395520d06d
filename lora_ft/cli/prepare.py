"""Commands for before a run: nothing is spent yet."""

from lora_ft import exits
from lora_ft.cli.app import AllowPickle, AsJson, ConfigFile, Debug, Set, TrustRemoteCode, command


@command
def check(
    config: ConfigFile,
    set: Set = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> None:
    """Everything short of training: config, rows, targets, memory.

    \b
    Example: lora-ft check configs/quickstart.yaml
    """
    from lora_ft.config import load_config

    settings = load_config(config, set or ())
    exits.quiet()
    from lora_ft.check import check

    check(settings, as_json=as_json, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
