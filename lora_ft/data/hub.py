"""Data sets of the hub, through `datasets`: the only room of data that may ask the network."""

from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from lora_ft.core.errors import DataError
from lora_ft.core.messages import first_line
from lora_ft.core.names import parse_hub_data
from lora_ft.model.hub import silent

WAYS_ON = (
    "Two ways on: point HF_HOME at a cache that holds it, or name a local file: --set data.train=FILE "
    "(data.eval likewise; --data FILE for eval)."
)


def load_split(source: str) -> datasets.Dataset:
    """The split that `id[:config][@split]` names, memory-mapped from the cache of `datasets`.

    Raises:
        DataError: the hub can't be reached and no cache has it (with the ways on), gated or private, no such data set,
            config or split; several splits and none named.
    """
    hub_id, config, split = parse_hub_data(source)
    page = f"https://huggingface.co/datasets/{hub_id}"
    login = f"Ask for access on {page}, then run `hf auth login`."
    why = silent(hub_id, "dataset")
    with _offline(why is not None):
        try:
            try:
                loaded = datasets.load_dataset(hub_id, config, split=split)
            except ConnectionError:  # offline, `datasets` looks only for what it made itself, not for the hub's files
                loaded = _load_cached_files(hub_id, config, split)
        except (FileNotFoundError, ConnectionError) as e:  # a gated data set is one that isn't found, too
            if "gated" in str(e) or isinstance(e.__cause__, GatedRepoError):
                raise DataError(f"data {source}: gated. {login}") from e
            if isinstance(e, ConnectionError):
                raise DataError(
                    f"data {source}: no such file here, the hub can't be reached ({why or first_line(e)}) and no local cache "
                    f"holds it. {WAYS_ON}"
                ) from e
            raise DataError(
                f"data {source}: neither a file here nor a public data set of the hub. If it is private, run "
                f"`hf auth login`. {first_line(e)}"
            ) from e
        except Exception as e:  # unknown configs and splits, data that won't parse: many classes, each with its message
            raise DataError(f"data {source}: {first_line(e)}") from e
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise DataError(f"data {source}: name one of its splits, as in {source}@{next(iter(loaded))}: {', '.join(loaded)}.")


def _load_cached_files(hub_id: str, config: str | None, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """What the hub's cache holds of a repository; ConnectionError if that is nothing.

    The cache may hold the files of one config or split only, and `datasets` wants those of the first config for any.
    """
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError as e:
        raise ConnectionError(str(e)) from e
    card = folder / "README.md"
    configs = (huggingface_hub.DatasetCard.load(card).data.get("configs") if card.is_file() else None) or []
    listed = next((c.get("data_files") for c in configs if c.get("config_name") == config), None)
    files = _present(folder, listed) if isinstance(listed, list) else None
    if not files:
        return datasets.load_dataset(str(folder), config, split=split)
    return datasets.load_dataset(str(folder), config, split=split, data_files=files, verification_mode="no_checks")


def _present(folder: Path, listed: list) -> dict[str, list[str]]:
    """Of a card's `data_files`, a list of {split, path}, the splits of which files are there."""
    files = {}
    for entry in listed:
        if isinstance(entry, dict):
            patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            if there := [pattern for pattern in patterns if any(folder.glob(pattern))]:
                files[entry["split"]] = there
    return files


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
