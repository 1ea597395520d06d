"""Data sets of the hub, through `datasets`: the only room of data that may ask the network."""

from contextlib import contextmanager

import datasets
import huggingface_hub
import huggingface_hub.constants
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_ft.errors import DataError
from lora_ft.names import parse_hub_data, printable

WAYS_ON = (
    "Two ways on: point HF_HOME at a cache that holds it, or name a local file: --set data.train=FILE "
    "(data.eval likewise; --data FILE for eval)."
)
SECONDS = 10


def load_split(source: str) -> datasets.Dataset:
    """The split that `id[:config][@split]` names, memory-mapped from the cache of `datasets`.

    Raises:
        DataError: the hub can't be reached and no cache has it (with the ways on), gated or private, no such data set,
            config or split; several splits and none named.
    """
    hub_id, config, split = parse_hub_data(source)
    page = f"https://huggingface.co/datasets/{hub_id}"
    login = f"Ask for access on {page}, then run `hf auth login`."
    with _offline(not _reachable(hub_id)):
        try:
            try:
                loaded = datasets.load_dataset(hub_id, config, split=split)
            except ConnectionError:  # offline, `datasets` looks only for what it made itself, not for the hub's files
                loaded = datasets.load_dataset(_cached_files(hub_id), config, split=split)
        except (FileNotFoundError, ConnectionError) as e:  # a gated data set is one that isn't found, too
            if "gated" in str(e) or isinstance(e.__cause__, GatedRepoError):
                raise DataError(f"data {source}: gated. {login}") from e
            if isinstance(e, ConnectionError):
                raise DataError(
                    f"data {source}: the hub can't be reached and no local cache holds it. {WAYS_ON}"
                ) from e
            raise DataError(
                f"data {source}: neither a file here nor a public data set of the hub. If it is private, run "
                f"`hf auth login`. {_first_line(e)}"
            ) from e
        except Exception as e:  # unknown configs and splits, data that won't parse: many classes, each with its message
            raise DataError(f"data {source}: {_first_line(e)}") from e
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise DataError(f"data {source}: name one of its splits, as in {source}@{next(iter(loaded))}: {', '.join(loaded)}.")


def _cached_files(hub_id: str) -> str:
    """The folder of the hub's cache that holds the repository's files; ConnectionError if there is none."""
    try:
        return huggingface_hub.snapshot_download(hub_id, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError as e:
        raise ConnectionError(str(e)) from e


def _reachable(hub_id: str) -> bool:
    """One quick question, because `datasets` asks six times over half a minute before it looks into its cache."""
    try:
        HfApi().dataset_info(hub_id, timeout=SECONDS)
    except (RepositoryNotFoundError, GatedRepoError):
        return True  # the hub answers; load_dataset has the words
    except HfHubHTTPError as e:
        return e.response is not None and e.response.status_code < 500
    except Exception:  # no network, a proxy's refusal, offline mode
        return False
    return True


@contextmanager
def _offline(yes: bool):
    """Within, `datasets` and `huggingface_hub` look into their caches only."""
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if yes:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _first_line(e: BaseException) -> str:
    return printable((str(e).strip() or type(e).__name__).splitlines()[0], 300)
