"""Data sets of the Hugging Face hub, through `datasets`: the only module of data/ that uses the network."""

from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from lora_ft.core.errors import DataError
from lora_ft.core.messages import first_line
from lora_ft.core.names import parse_hub_data
from lora_ft.model.hub import why_unreachable


def load_split(source: str) -> datasets.Dataset:
    """The split named by `id[:config][@split]`, memory-mapped from the cache of `datasets`.

    Raises:
        DataError: the hub cannot be reached and the data set is not cached; it is gated, private or does not exist; or
            it has several splits and none is named.
    """
    hub_id, config, split = parse_hub_data(source)
    page = f"https://huggingface.co/datasets/{hub_id}"
    why = why_unreachable(hub_id, "dataset")
    with _offline(why is not None):
        try:
            try:
                loaded = datasets.load_dataset(hub_id, config, split=split)
            except ConnectionError:  # offline, `datasets` reads only tables that it prepared, not downloaded files
                loaded = _load_cached_files(hub_id, config, split)
        except (FileNotFoundError, ConnectionError) as e:  # a gated data set is also "not found"
            if "gated" in str(e) or isinstance(e.__cause__, GatedRepoError):
                raise DataError(f"data {source}: gated. Request access on {page}, then run `hf auth login`.") from e
            if isinstance(e, ConnectionError):
                raise DataError(
                    f"data {source}: not a local file, the hub cannot be reached ({why or first_line(e)}) and no local cache "
                    "contains it. Point HF_HOME at a cache that contains it, or use a local file: --set data.train=FILE "
                    "(likewise data.eval; --data FILE for eval)."
                ) from e
            raise DataError(
                f"data {source}: neither a local file nor a public data set on the hub. If it is private, run "
                f"`hf auth login`. {first_line(e)}"
            ) from e
        except Exception as e:  # unknown config or split, data that cannot be parsed, ...: many classes
            raise DataError(f"data {source}: {first_line(e)}") from e
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise DataError(f"data {source}: name one of its splits, as in {source}@{next(iter(loaded))}: {', '.join(loaded)}.")


def _load_cached_files(hub_id: str, config: str | None, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """A data set from the files in the hub's cache; raises ConnectionError if there are none.

    The cache may contain the files of a single config or split; `datasets` by itself requires those of the first config.
    """
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError as e:
        raise ConnectionError(str(e)) from e
    card = folder / "README.md"
    configs = (huggingface_hub.DatasetCard.load(card).data.get("configs") if card.is_file() else None) or []
    data_files = next((c.get("data_files") for c in configs if c.get("config_name") == config), None)
    files = _cached_splits(folder, data_files) if isinstance(data_files, list) else None
    options = {"data_files": files, "verification_mode": "no_checks"} if files else {}
    return datasets.load_dataset(str(folder), config, split=split, **options)


def _cached_splits(folder: Path, data_files: list) -> dict[str, list[str]]:
    """The path patterns that match files in `folder`, by split; data_files: a card's list of {split, path}."""
    files = {}
    for entry in data_files:
        if isinstance(entry, dict):
            patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            if cached := [pattern for pattern in patterns if any(folder.glob(pattern))]:
                files[entry["split"]] = cached
    return files


@contextmanager
def _offline(offline: bool):
    """If `offline`, `datasets` and `huggingface_hub` read only their caches inside the block."""
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
