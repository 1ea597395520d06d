"""Model repositories on the hub. Cached files need no network, and an unreachable hub costs seconds, not minutes."""

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

HUB_TIMEOUT_SECONDS = 10
IGNORED_FILES = ["*/*", "consolidated*"]  # folders of other formats, and a second copy of the weights
OFFLINE_HINT = (
    "Point HF_HOME at a cache that has it, or use a local folder: --set model.name=FOLDER "
    "(--base FOLDER for an adapter)."
)


def why_unreachable(repo: str, kind: str, revision: str | None = None) -> str | None:
    """Why the hub can't be reached, or None if it responds, even with a refusal. kind: "model" or "dataset".

    One request with a short timeout: the hub's own libraries retry for half a minute or longer before they use their caches.
    """
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=HUB_TIMEOUT_SECONDS)
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else 0
        return f"it responds with status {status}" if status >= 500 else None
    except HFValidationError:
        return None  # an invalid name is never sent
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as e:  # no network, a proxy's refusal, a timeout: errors of many classes
        return first_line(e)
    return None


def cached_commit(name: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The cached folder of a hub model if `revision` is a commit (40 hex digits, so it never changes), else None.

    The folder may be incomplete: an earlier download may have been interrupted, or of other files.
    """
    return cached(name, revision, patterns) if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else None


def cached(name: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The cached folder of a hub model, perhaps incomplete; None if it is not cached. Asks no network."""
    try:
        return _files(name, revision, patterns, local_only=True)
    except (OSError, ValueError):  # not cached
        return None


def snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The cached folder of a hub model, downloaded if needed; if the hub can't be reached, the cached copy is used.

    Raises:
        ModelError: no such model or revision, a gated or private one, or an unreachable hub and no cached copy.
    """
    why = why_unreachable(name, "model", revision)
    try:
        return _files(name, revision, patterns, local_only=why is not None)
    except GatedRepoError as e:
        way = f"Request access on https://huggingface.co/{name}, then run `hf auth login`."
        raise ModelError(f"model {name}: gated. {way}") from e
    except RevisionNotFoundError as e:
        raise ModelError(f"model {name}: has no revision {revision!r}.") from e
    except RepositoryNotFoundError as e:
        problem = "not a local folder and not a public model on the hub. If it is private, run `hf auth login`."
        raise ModelError(f"model {name}: {problem}") from e
    except HFValidationError as e:
        raise ModelError(f"model {name}: no such folder, and not a valid hub id.") from e
    except Exception as e:  # not cached, or a network error during the download: errors of many classes
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # the disk, not the network
        if why is None:
            with suppress(OSError, ValueError):  # not cached
                return _files(name, revision, patterns, local_only=True)
        problem = f"not a local folder, not cached, and the hub can't be reached ({why or first_line(e)})."
        raise ModelError(f"model {name}: {problem} {OFFLINE_HINT}") from e


def _files(name: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    filters: dict = {"allow_patterns": patterns, "ignore_patterns": IGNORED_FILES, "local_files_only": local_only}
    return Path(huggingface_hub.snapshot_download(name, revision=revision, **filters))
