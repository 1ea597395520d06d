"""What goes to the Hugging Face Hub when the user asks for it: exactly the exported files and a model card, in one commit."""

from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.names import is_local
from lora_ft.core.run_folder import RECORD

CARD = "README.md"
LOGIN = "Make a token with write access on https://huggingface.co/settings/tokens, then run `hf auth login`."
USE = {
    "peft": "A LoRA adapter: `PeftModel.from_pretrained(base, REPO)`.",
    "merged": "A LoRA adapter folded into its base: an ordinary transformers model.",
    "lora.gguf": "A LoRA adapter for llama.cpp: `llama-cli -m BASE.gguf --lora {file}`, with a GGUF of the base.",
    "merged.gguf": "A LoRA adapter folded into its base, for llama.cpp: `llama-cli -m {file}`.",
    "model.gguf": "A model for llama.cpp: `llama-cli -m {file}`.",
}
RELATION = {"peft": "adapter", "lora.gguf": "adapter", "merged": "finetune", "merged.gguf": "finetune"}
LIBRARY = {"peft": "peft", "merged": "transformers"}


def check(repo: str) -> None:
    """Whether a push could work at all, before minutes of other work.

    Raises:
        ConfigError: no name of a repository. ModelError: offline, or no token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ConfigError(
            f"--push {repo}: no name of a repository, which is owner/name. {str(e).splitlines()[0]}"
        ) from e
    if is_offline_mode():
        raise ModelError(f"--push {repo}: HF_HUB_OFFLINE is set, so the hub is never asked. Unset it.")
    if not get_token():
        raise ModelError(f"--push {repo}: no token for the hub on this machine. {LOGIN}")


def uploads(target: Path, kind: str, base_name: str) -> dict[str, Path | bytes]:
    """Name in the repository -> file: what an export made, without our record, which may hold paths; and a card."""
    files: dict[str, Path | bytes] = {target.name: target}
    if target.is_dir():
        found = (p for p in sorted(target.rglob("*")) if p.is_file() and p.name != RECORD)
        files = {p.relative_to(target).as_posix(): p for p in found}
    return {CARD: card(kind, base_name, target.name).encode()} | files


def push(repo: str, files: dict[str, Path | bytes], public: bool) -> str:
    """Make the repository if need be (private, unless `public`) and commit the files. Returns its address.

    Raises:
        ModelError: the hub can't be reached, or says no.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        api.create_commit(repo, operations, commit_message="Upload by lora-ft")
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        hint = LOGIN if status in (401, 403) else "Nothing else was changed; what was exported is here."
        raise ModelError(f"--push {repo}: the hub says no ({str(e).splitlines()[0]}). {hint}") from e
    except Exception as e:  # the network's errors have many classes
        if isinstance(e, OSError | RuntimeError | ValueError) or type(e).__module__.startswith(("httpx", "requests")):
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise ModelError(
                f"--push {repo}: the hub can't be reached ({why}). What was exported is here; try again."
            ) from e
        raise
    return str(url)


def card(kind: str, base_name: str, file: str) -> str:
    """A model card for what has none of its own."""
    named = {} if is_local(base_name) else {"base_model": base_name}
    if named and kind in RELATION:
        named["base_model_relation"] = RELATION[kind]
    about = {"library_name": LIBRARY.get(kind, "gguf"), "pipeline_tag": "text-generation", "tags": ["lora", "lora-ft"]}
    head = yaml.safe_dump(named | about, sort_keys=True).strip()
    return f"---\n{head}\n---\n\n# {file}\n\n{USE[kind].format(file=file)}\n\nBase: {base_name}\n"
