"""`lora-ft serve`: a base and its adapters behind OpenAI's API, until SIGTERM or Ctrl-C."""

import ipaddress
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

try:
    import starlette  # noqa: F401
    import uvicorn
except ImportError as e:
    from lora_ft.core.errors import ConfigError

    raise ConfigError("serve needs starlette and uvicorn: pip install 'lora-ft[serve]'") from e

from lora_ft.commands.generate.command import find_adapters
from lora_ft.commands.generate.serving import Served, load
from lora_ft.commands.serve.api import Api, Settings
from lora_ft.commands.serve.engine import Engine
from lora_ft.commands.serve.jobs import Limits
from lora_ft.commands.serve.metrics import Metrics
from lora_ft.commands.serve.thread import started
from lora_ft.core.errors import ConfigError, FilesError
from lora_ft.core.machine import free_memory
from lora_ft.core.messages import echo, info, printable
from lora_ft.core.paths import local_path
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.model.generate import logits_processors
from lora_ft.model.row_cache import Forward, RowCache

DEFAULT = Limits()
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def serve_command(
    folders: Sequence[Path],
    *,
    adapters: Sequence[str] = (),
    base: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    insecure: bool = False,
    adapters_folder: Path | None = None,
    limits: Limits = DEFAULT,
    seconds: float = 600,
    trust: Trust = NO_TRUST,
) -> None:
    """Serve until a signal; what runs then is finished.

    Raises:
        ConfigError: without a key on other than loopback, a key file or a folder that can't be used, or too little memory.
        UserError: as `find_adapters` and `load`.
    """
    keys = read_keys(api_key_file) if api_key_file else ()
    if not (keys or insecure or is_loopback(host)):
        raise ConfigError(
            f"--host {printable(host)}: other machines could use the model without a key. Give --api-key-file FILE, or "
            "--insecure if that is meant."
        )
    if adapters_folder and not adapters_folder.is_dir():
        raise ConfigError(f"--adapters-folder {adapters_folder}: no such folder")
    named, base = find_adapters(folders, adapters, base)

    def make() -> Engine:
        served = load(named, base, raw=False, trust=trust)
        logits_processors(served.model, served.sampling, served.ends, 1)  # an unusable generation config fails here
        check_memory(served, limits)
        return Engine(served, limits, Metrics())

    engine = started(make)
    try:
        _serve(engine, host, port, keys, adapters_folder, seconds)
    finally:
        engine.stop()


def _serve(
    engine: Engine, host: str, port: int, keys: tuple[str, ...], adapters_folder: Path | None, seconds: float
) -> None:
    """Listen until a signal."""
    served, limits = engine.served, engine.limits
    hosts = None if keys or not is_loopback(host) else (*LOCAL, host)
    base_name = (
        served.base.name if not local_path(served.base.name).exists() else local_path(served.base.name).resolve().name
    )
    settings = Settings(base_name, keys, adapters_folder, hosts, seconds)
    config = uvicorn.Config(
        Api(served, engine, settings).app,
        host=host,
        port=port,
        log_config=None,  # nothing of requests is logged
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(seconds) + 1,
        h11_max_incomplete_event_size=16_384,
    )
    server = Server(config)
    try:
        sock = config.bind_socket()
    except SystemExit:
        raise FilesError(
            f"{printable(host)}:{port}: the address can't be used; is another server there? Try --port."
        ) from None
    place = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    if not engine.together:
        info("note: this model can't compute different requests at once: they are answered one after the other")
    sock.listen(config.backlog)  # who reads the address may ask at once
    echo(f"{place}/v1: {', '.join([base_name, *served.names])}; {limits.tokens:,} tokens in the cache")
    server.run(sockets=[sock])


class Server(uvicorn.Server):
    """uvicorn's server, for which a signal is the way to end, not a failure."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting and finish what runs; a second signal exits at once."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        info(f"{signal.Signals(sig).name}: finishing what runs")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; ConfigError if there is none, or one can't be sent in a header."""
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"--api-key-file {path}: can't be read ({getattr(e, 'strerror', None) or 'not UTF-8'})"
        ) from e
    if not keys or not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigError(f"--api-key-file {path}: give one key a line, in ASCII without spaces")
    return keys


def check_memory(served: Served, limits: Limits) -> None:
    """ConfigError unless free memory holds a cache of so many tokens."""
    cache = RowCache()
    try:
        Forward(served.model)(torch.tensor([[0, 1]]), cache, [0])
        needed = cache.token_bytes * limits.tokens
    except (TypeError, AttributeError, IndexError):  # a recurrent state: it does not grow
        return
    if served.model.device.type == "cpu" and needed > (free := free_memory()).size:
        raise ConfigError(
            f"--cache-tokens {limits.tokens}: {needed / 2**20:,.0f} MiB for keys and values; "
            f"{free.size / 2**20:,.0f} MiB are {free.where}. Lower it."
        )
