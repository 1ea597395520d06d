"""Upload an export to the Hugging Face Hub when the user asks for it: its files and a model card, in one commit."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import first_line
from lora_ft.core.run_folder import RECORD
from lora_ft.methods.model_card import CARD, export_card

LOGIN = "Create a token with write access on https://huggingface.co/settings/tokens, then run `hf auth login`."


def check(repo: str) -> None:
    """Check, before any other work, that a push can work.

    Raises:
        ConfigError: `repo` is not a valid repository name.
        ModelError: offline mode, or no token.
    """
    try:
        validate_repo_id(repo)
        if "/" not in repo:  # valid for a model of the hub's own, to which nobody can push
            raise HFValidationError("The owner is missing.")
    except HFValidationError as e:
        raise ConfigError(f"--push {repo}: not a valid repository name; it is owner/name. {first_line(e)}") from e
    if is_offline_mode():
        raise ModelError(f"--push {repo}: HF_HUB_OFFLINE is set, so the hub can't be used. Unset it.")
    if not get_token():
        raise ModelError(f"--push {repo}: no token for the hub on this machine. {LOGIN}")


def uploads(target: Path, kind: str, base_name: str) -> dict[str, Path | bytes]:
    """Name in the repository -> file: the exported files, without lora_ft.json (which may have paths), and a card."""
    files: dict[str, Path | bytes] = {target.name: target}
    if target.is_dir():
        exported = (p for p in sorted(target.rglob("*")) if p.is_file() and p.name != RECORD)
        files = {p.relative_to(target).as_posix(): p for p in exported}
    return {CARD: export_card(kind, base_name, target.name).encode()} | files


def push(repo: str, files: dict[str, Path | bytes], public: bool) -> str:
    """Create the repository if it does not exist (private unless `public`) and commit the files. Returns its URL.

    Raises:
        ModelError: the hub can't be reached, or refused the upload.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        api.create_commit(repo, operations, commit_message="Upload by lora-ft")
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        hint = LOGIN if status in (401, 403) else "Nothing else was changed; the exported files are kept."
        raise ModelError(f"--push {repo}: the hub refused the upload ({first_line(e)}). {hint}") from e
    except Exception as e:  # network errors have many classes
        if isinstance(e, OSError | RuntimeError | ValueError) or type(e).__module__.startswith(("httpx", "requests")):
            why = f"the hub can't be reached ({first_line(e)})"
            raise ModelError(f"--push {repo}: {why}. The exported files are kept; try again.") from e
        raise
    return str(url)
