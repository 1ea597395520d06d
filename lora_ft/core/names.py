"""What names in a config mean: roles, local or hub, columns in braces. Knows no model and no data, imports no torch."""

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

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gguf")  # of data files and models: always local


def is_local(name: str) -> bool:
    """Whether a model or data name means something on this machine; such a name is never asked of the network."""
    return (
        os.path.exists(name)
        or name.startswith(("/", ".", "~"))
        or name.count("/") >= 2
        or name.lower().endswith(SUFFIXES)
        or ("/" in name and os.path.isdir(name.split("/")[0]))
    )


def portable_name(name: str) -> str:
    """A hub id or relative path as it is, of an absolute path the last part: what may leave this machine."""
    absolute = Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith("~")
    return PureWindowsPath(name).name if absolute else name


def parse_hub_data(source: str) -> tuple[str, str | None, str | None]:
    """`id[:config][@split]` -> (id, config, split); the split may be a slice such as `train[:100]`.

    Raises:
        ConfigError: a part is empty, or the id is not `name` or `owner/name`.
    """
    before, at, split = source.partition("@")
    hub_id, colon, config = before.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id, re.ASCII) or (colon and not config) or (at and not split):
        raise ConfigError(
            f"{format_value(source)}: neither a file here nor the name of a hub data set, which is owner/name[:config][@split]"
        )
    return hub_id, config or None, split or None


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template such as "Review: {sentence}" names, in order, each once; `{{` is a plain brace.

    Raises:
        ValueError: what is wrong with the braces, as a sentence.
    """
    hint = "a column name stands in braces, as in {sentence}; write {{ and }} for plain braces"
    columns = []
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        raise ValueError(f"a brace is not closed, or never opened: {hint}") from None
    for _, column, spec, conversion in parts:
        if column is None:
            continue
        if spec or conversion or not column.strip() or re.search(r"[.\[\]{}]", column):
            whole = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{printable('{' + whole + '}')} is not a column name: {hint}")
        columns.append(column)
    return tuple(dict.fromkeys(columns))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be, or None."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower()[:100], lower, n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def nearest_role(word: str) -> str:
    """The role or group nearest to a word that is none, such as a module's name: q_proj is q, query is q."""
    stem = re.sub(r"_?proj$", "", word.lower().rsplit(".", 1)[-1])
    choices = (*ROLES, *GROUPS)
    first = [choice for choice in choices if stem and choice[0] == stem[0]]
    return stem if stem in choices else nearest(stem, choices) or (first or ["all"])[0]
