"""Repositories of the hub: what is cached here is found without network, and a hub that doesn't answer costs seconds."""

import errno
import re
from contextlib import suppress
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import first_line

SECONDS = 10  # that the hub may take to answer the first question
UNWANTED = ["*/*", "consolidated*"]  # other formats' folders, and the same weights once more
OFFLINE = (
    "Two ways on: point HF_HOME at a cache that holds it, or name a local folder: --set model.name=FOLDER "
    "(--base FOLDER for eval and merge)."
)


def silent(repo: str, kind: str, revision: str | None = None) -> str | None:
    """Why the hub gives no answer about a model or dataset; None if it answers, be it with a refusal.

    One quick question, because the libraries ask several times, for half a minute or for ever, before they look into
    their caches.
    """
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=SECONDS)
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else 0
        return f"it answers with {status}" if status >= 500 else None
    except HFValidationError:
        return None  # it isn't even asked about such a name
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as e:  # no network, a proxy's refusal, no answer in time: many classes
        return first_line(e)
    return None


def cached_commit(name: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The folder of a hub model's files, if `revision` is a commit (40 hex digits: it never changes) and the cache has it.

    Not always all of them: an earlier download may have been broken off, or have wanted less.
    """
    if not (revision and re.fullmatch(r"[0-9a-f]{40}", revision)):
        return None
    try:
        return _files(name, revision, patterns, local_only=True)
    except (OSError, ValueError):  # not cached, or not whole
        return None


def snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a hub model's files in the cache, brought there if need be. Without the hub the cache serves.

    Raises:
        ModelError: the hub can't be reached and no cache has it (with the ways on), gated or private, no such model.
    """
    why = silent(name, "model", revision)
    try:
        return _files(name, revision, patterns, local_only=why is not None)
    except GatedRepoError as e:
        raise ModelError(
            f"model {name}: gated. Ask for access on https://huggingface.co/{name}, then run `hf auth login`."
        ) from e
    except RevisionNotFoundError as e:
        raise ModelError(f"model {name}: no revision {revision!r}.") from e
    except RepositoryNotFoundError as e:
        raise ModelError(
            f"model {name}: neither a folder here nor a public model on the hub. If it is private, run `hf auth login`."
        ) from e
    except HFValidationError as e:
        raise ModelError(f"model {name}: no folder of that name here, and no valid hub id either.") from e
    except Exception as e:  # not cached; or the network's errors in the middle of a download, of many classes
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # this machine's disk, not the network
        if why is None:
            with suppress(OSError, ValueError):  # not cached
                return _files(name, revision, patterns, local_only=True)
        raise ModelError(
            f"model {name}: no such folder here, the hub can't be reached ({why or first_line(e)}) and no local cache "
            f"holds it. {OFFLINE}"
        ) from e


def _files(name: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    found = huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=patterns, ignore_patterns=UNWANTED, local_files_only=local_only
    )
    return Path(found)
