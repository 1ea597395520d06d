"""Names in a config: roles, local paths and hub ids, columns in braces."""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from string import Formatter

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value, printable

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "all": ROLES}

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".zst")


def is_local(name: str) -> bool:
    """Whether a model or data name is a path on this machine; then it is never looked up on the hub."""
    return (
        os.path.exists(name)
        or name.startswith(("/", ".", "~"))
        or name.count("/") >= 2
        or name.lower().endswith((*DATA_SUFFIXES, ".gguf"))
        or name.lower().endswith(COMPRESSED_SUFFIXES)
        or "*" in name
        or ("/" in name and os.path.isdir(name.split("/")[0]))
    )


def portable_name(name: str) -> str:
    """A name without folders of this machine: the last part of an absolute path; a hub id or relative path unchanged."""
    absolute = Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith("~")
    return PureWindowsPath(name).name if absolute else name


def parse_hub_data(source: str) -> tuple[str, str | None, str | None]:
    """Split `id[:config][@split]` into (id, config, split); the split may be a slice such as `train[:100]`.

    Raises:
        ConfigError: a part is empty, or the id is not `name` or `owner/name`.
    """
    before, at, split = source.partition("@")
    hub_id, colon, config = before.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id, re.ASCII) or (colon and not config) or (at and not split):
        expected = "the name of a hub dataset (owner/name[:config][@split])"
        raise ConfigError(f"{format_value(source)}: no such file, and not {expected}")
    return hub_id, config or None, split or None


def template_columns(template: str) -> tuple[str, ...]:
    """The distinct columns in a template such as "Review: {sentence}", in order; `{{` is a literal brace.

    A value inside a column of objects or lists counts as a column: `{answers[text][0]}`.

    Raises:
        ValueError: a brace is not closed, or encloses something else than a column name.
    """
    hint = "put a column name in braces, as in {sentence}, and write {{ and }} for literal braces"
    columns = []
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        raise ValueError(f"a brace is not closed or not opened: {hint}") from None
    for _, column, spec, conversion in parts:
        if column is None:
            continue
        if spec or conversion or not column.strip() or not re.fullmatch(r"[^.\[\]{}]+(\[[^\[\]{}]+\])*", column):
            field = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{printable('{' + field + '}')} is not a column name: {hint}")
        columns.append(column)
    return tuple(dict.fromkeys(columns))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most similar to a misspelled `word`, or None if none is similar."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower()[:100], lower, n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def nearest_role(word: str) -> str:
    """The role or group most similar to an unknown word, such as a module's name: q for q_proj and for query."""
    stem = re.sub(r"_?proj$", "", word.lower().rsplit(".", 1)[-1])
    choices = (*ROLES, *GROUPS)
    return nearest(stem, choices) or next((choice for choice in choices if choice[0] == stem[:1]), "all")
