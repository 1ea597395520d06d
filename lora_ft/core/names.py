"""Names in a config: roles, local paths and hub ids, columns in braces."""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from string import Formatter
from typing import NamedTuple

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value, printable

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "all": ROLES}

BRACKETS = re.compile(r"(\[{4}|\]{4}|\[\[|\]\](?!\]))")  # of the optional parts of a template, and escaped ones

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".zst")


def is_local(name: str) -> bool:
    """Whether a model or data name is a path on this machine; then it is never looked up on the hub."""
    return (
        os.path.exists(name)
        or name.startswith(("/", ".", "~"))
        or name.count("/") >= 2
        or "\\" in name
        or PureWindowsPath(name).is_absolute()
        or name.lower().endswith((*DATA_SUFFIXES, ".gguf"))
        or name.lower().endswith(COMPRESSED_SUFFIXES)
        or "*" in name
        or ("/" in name and os.path.isdir(name.split("/")[0]))
    )


def with_slashes(name: str) -> str:
    """A path written for Windows, `data\\x.jsonl`, with slashes: each system opens it then, and a record that has it too.

    Where a file has such a name, as only other systems allow, it stays.
    """
    return name if "\\" not in name or (os.sep == "/" and os.path.exists(name)) else name.replace("\\", "/")


def portable_name(name: str) -> str:
    """A name without folders of this machine: the last part of an absolute path; a hub id or relative path unchanged."""
    absolute = Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith("~")
    return PureWindowsPath(name).name if absolute else name


def published_name(name: str) -> str:
    """A name for others: of any path of this machine only the last part; a hub id unchanged."""
    return PureWindowsPath(name).name if is_local(name) else portable_name(name)


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


class TemplatePart(NamedTuple):
    """A piece of a template: pairs of a literal text and the column after it, or None.

    optional: written in [[ ]], and left out of rows in which all its columns are empty.
    """

    fields: tuple[tuple[str, str | None], ...]
    optional: bool

    @property
    def columns(self) -> list[str]:
        """Its columns, in order."""
        return [column for _, column in self.fields if column is not None]


def template_parts(template: str) -> list[TemplatePart]:
    """The parts of a template such as "Task: {task}[[\\nInput: {input}]]", in order.

    `{{` is a literal brace, `[[[[` a literal [[ and `]]]]` a literal ]]. Brackets without a column between them are text.

    A value inside a column of objects or lists counts as a column: `{answers[text][0]}`.

    Raises:
        ValueError: a brace or [[ is not closed, or a brace encloses something else than a column name.
    """
    hint = "put a part that may be empty in [[ and ]], and write [[[[ and ]]]] for literal ones"
    parts: list[TemplatePart] = []
    fields: list[tuple[str, str | None]] = []
    opened = False
    for piece in BRACKETS.split(template):
        if piece == "[[" or (piece == "]]" and opened):
            if piece == "[[" and opened:
                raise ValueError(f"a [[ is inside of another or not closed: {hint}")
            part = TemplatePart(tuple(fields), opened)
            if opened and not part.columns:
                part = TemplatePart((("[[", None), *fields, ("]]", None)), optional=False)
            parts.append(part)
            fields, opened = [], not opened
        else:
            fields += [(piece[:2], None)] if piece in ("[[[[", "]]]]") else _fields(piece)
    if opened:
        raise ValueError(f"a [[ is not closed: {hint}")
    return [part for part in (*parts, TemplatePart(tuple(fields), optional=False)) if part.fields]


def _fields(text: str) -> list[tuple[str, str | None]]:
    hint = "put a column name in braces, as in {sentence}, and write {{ and }} for literal braces"
    try:
        parsed = list(Formatter().parse(text))
    except ValueError:
        raise ValueError(f"a brace is not closed or not opened: {hint}") from None
    for _, column, spec, conversion in parsed:
        if column is None:
            continue
        if spec or conversion or not column.strip() or not re.fullmatch(r"[^.\[\]{}]+(\[[^\[\]{}]+\])*", column):
            field = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{printable('{' + field + '}')} is not a column name: {hint}")
    return [(literal, column) for literal, column, _, _ in parsed]


def template_columns(template: str, optional: bool | None = None) -> tuple[str, ...]:
    """The distinct columns of a template in order: all, or those that are only in optional parts, or the others.

    Raises:
        ValueError: as `template_parts`.
    """
    parts = template_parts(template)
    needed = {column for part in parts if not part.optional for column in part.columns}
    columns = dict.fromkeys(column for part in parts for column in part.columns)
    return tuple(column for column in columns if optional is None or (column in needed) != optional)


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
