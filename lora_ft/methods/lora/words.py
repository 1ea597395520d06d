"""Words that choose among adapted modules: a role or group (`q`, `mlp`), layers (`3`, `6-11`), or a module's name or suffix."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from lora_ft.core import names
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.methods.lora.targets import PartRows

T = TypeVar("T")


def chooses(word: str, path: str, part: str) -> bool:
    """Whether a word stands for a part (a role, or ALL_ROWS) of the module at `path`, whose first number is its layer."""
    if word in names.ROLES or word in names.GROUPS:
        return part in names.GROUPS.get(word, (word,))
    if layers := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
        layer = next((int(number) for number in path.split(".") if number.isdigit()), -1)
        return int(layers[1]) <= layer <= int(layers[2] or layers[1])
    return f".{path}".endswith(f".{word}")


def without(adapted: Mapping[str, PartRows], words: Sequence[str]) -> dict[str, PartRows]:
    """Path -> parts, as `find_targets` has them, without those that `words` stand for. ModelError if nothing is left."""
    check_words("adapter.exclude", words, adapted)
    kept = {
        path: {part: of for part, of in rows.items() if not any(chooses(word, path, part) for word in words)}
        for path, rows in adapted.items()
    }
    if not any(kept.values()):
        raise ModelError(f"adapter.exclude: nothing is left to adapt without {', '.join(words)}")
    return {path: rows for path, rows in kept.items() if rows}


def by_module(setting: str, values: Mapping[str, T], adapted: Mapping[str, PartRows], default: T) -> dict[str, T]:
    """Path -> the value of the first word in `values` that stands for the module, else `default`.

    Raises:
        ModelError, naming the setting: a word stands for nothing, or the parts of a module would have several values.
    """
    check_words(setting, [*values], adapted)
    chosen = {}
    for path, rows in adapted.items():
        found = {next((v for word, v in values.items() if chooses(word, path, part)), default) for part in rows}
        if len(found) > 1:
            parts = " and ".join(rows)
            raise ModelError(f"{setting}: {path} holds {parts} in one module, which has one value: give them the same")
        chosen[path] = found.pop()
    return chosen


def check_words(setting: str, words: Sequence[str], adapted: Mapping[str, PartRows]) -> None:
    """Raise ModelError, naming the setting, if a word stands for none of the adapted modules."""
    for word in words:
        if not any(chooses(word, path, part) for path, rows in adapted.items() for part in rows):
            modules = listed(sorted({path.rpartition(".")[2] for path in adapted}))
            raise ModelError(f"{setting}: {word!r} stands for none of the adapted modules, which are {modules}")
