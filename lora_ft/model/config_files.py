"""Checks of a base's config and tokenizer files, before transformers reads them: damaged, absurd, or too large."""

import json
import re
from pathlib import Path
from typing import Any

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import format_value, printable
from lora_ft.core.storage import read_json
from lora_ft.model.files import Base

CONFIGS = ("config.json", "generation_config.json")
# the files beside the weights that transformers reads, and the most bytes of one; the largest tokenizer.json has 40 MB
SMALL_FILES = ["*config.json", "token*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
SMALL_FILES += ["chat_template*", "*.model", "*.tiktoken"]
SMALL_LIMIT = 256 * 2**20
COUNTS = re.compile(r"(num|n)_\w*(layer|expert|head|block)\w*|\w*_layers|depth")  # keys of a config that count modules
MOST_MODULES = 2_048


def check_config_files(base: Base) -> None:
    """Raise ModelError for a file that is too large or damaged, or a config of more modules than any model has."""
    if base.gguf:
        return
    for path in (p for pattern in SMALL_FILES for p in base.folder.glob(pattern)):
        if path.is_file() and (size := path.stat().st_size) > SMALL_LIMIT:
            limit = f"the limit for a model's config and tokenizer files is {SMALL_LIMIT // 2**20} MiB"
            raise ModelError(f"{path}: has {size // 2**20} MiB; {limit}. Copy the file again.")
    for path in (base.folder / name for name in CONFIGS if (base.folder / name).is_file()):
        if problem := damage(path):  # of these two, transformers ignores a damaged generation_config.json
            raise ModelError(f"{path}: {problem}. Copy the file again.")
        content = read_json(path, ModelError)
        for name, value in content.items():
            ids = value if isinstance(value, list) else [value]
            if name.endswith("_token_id") and value is not None and not all(type(i) is int for i in ids):
                raise ModelError(
                    f"{path}: {printable(name)} is {format_value(value)}, not a token id. Copy the file again."
                )
        if (size := content.get("vocab_size", 1)) is not None and (type(size) is not int or size < 1):
            raise ModelError(
                f"{path}: vocab_size is {format_value(size)}, not a number of tokens. Copy the file again."
            )
        if count := absurd_count(content):
            raise ModelError(f"{path}: {count}; the limit is {MOST_MODULES:,}. Copy the file again.")


def damage(path: Path) -> str | None:
    """What is wrong with one of a base's JSON files, or None."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        return f"not valid JSON ({e})"
    objects = path.name in (*CONFIGS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return f"holds a {type(content).__name__}, not an object" if objects and not isinstance(content, dict) else None


def absurd_count(content: Any, key: str = "") -> str | None:
    """The first number of layers, experts, heads or blocks above MOST_MODULES in a config: each would be a module."""
    if isinstance(content, dict):
        return next((found for k, v in content.items() if (found := absurd_count(v, k))), None)
    is_number = isinstance(content, int | float) and not isinstance(content, bool)
    return f"{key} is {content}" if is_number and COUNTS.fullmatch(key) and content > MOST_MODULES else None
