"""A strict YAML reader: plain data and the line of every key, or a list of problems.

Plain words are read as in YAML 1.2 (1e-4 is a number; `no`, `on`, 12:30 and 2024-01-01 are text). Only what a config needs is
accepted: no repeated keys, tags, anchors or aliases, and a limited size and depth. The values are built here from PyYAML's
parser events, so that a file cannot construct objects.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from yaml.reader import ReaderError

from lora_ft.core.messages import format_value, printable

MAX_BYTES = 128 * 1024
MAX_DEPTH = 20
TOO_LARGE = f"too large; a config has at most {MAX_BYTES // 1024} KiB"
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
HINTS = {  # part of PyYAML's message -> the probable remedy
    "mapping values are not allowed": 'a text that contains ": " needs quotes',
    "\\t": "indent with spaces, not tabs",
    "block end": "the indentation does not match the lines above",
    "escape": "in double quotes \\ starts an escape: use single quotes, or / in a path",
    "cannot start any token": "a text that starts with this character needs quotes",
}
Path = tuple[str | int, ...]  # ("adapter", "targets", 1)

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Problem(NamedTuple):
    """Something the reader refuses, after which it continues."""

    path: Path
    line: int
    message: str
    unread: bool = False  # the setting at `path` has no value to validate


class Document(NamedTuple):
    """The content of a file."""

    value: Any
    lines: dict[Path, int]  # of each key and list item, from 1
    problems: list[Problem]


class Unreadable(Exception):
    """The text is not YAML, too deep or too large. line: from 1, where known."""

    def __init__(self, line: int | None, message: str):
        super().__init__(message)
        self.line, self.message = line, message


def read(text: str) -> Document:
    """Parse one document, or raise Unreadable. An empty one has the value None."""
    if len(text) > MAX_BYTES:
        raise Unreadable(None, TOO_LARGE)
    try:
        return _Builder(yaml.parse(text.removeprefix("\ufeff"), Loader=_Loader)).document()
    except ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise Unreadable(line, f"the character {printable(chr(e.character))} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise Unreadable(mark.line + 1 if mark else None, _plain_words(e)) from None
    except (ValueError, OverflowError):  # PyYAML's chr(): \UFFFFFFFF in quotes is not a character
        raise Unreadable(None, "an escape code (\\U...) in quotes is not a character") from None


def _plain_words(e: yaml.MarkedYAMLError) -> str:
    problem = printable(e.problem or e.context or "cannot be read")
    hint = next((f"; {hint}" for part, hint in HINTS.items() if part in problem), "")
    column = f" (column {e.problem_mark.column + 1})" if e.problem_mark else ""
    return f"not valid YAML: {problem}{column}{hint}"


class _Loader(yaml.SafeLoader):
    """Limits the depth of brackets in the scanner, which reads ahead of the parser and is slow for many open ones."""

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        if self.flow_level > MAX_DEPTH:
            raise Unreadable(self.line + 1, TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)


class _Builder:
    """Builds values, lines and problems from parser events."""

    def __init__(self, events: Iterator[Any]):
        self.events = events
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []

    def document(self) -> Document:
        next(self.events)  # the start of the stream
        value = None
        if isinstance(next(self.events), yaml.DocumentStartEvent):
            value = self.value((), next(self.events))
            next(self.events)  # the end of the document
            if isinstance(event := next(self.events), yaml.DocumentStartEvent):
                line = event.start_mark.line + 1  # type: ignore[union-attr]
                raise Unreadable(line, "a second document starts here (---); a config is a single document")
        return Document(value, self.lines, self.problems)

    def problem(self, path: Path, event: Any, message: str) -> None:
        self.problems.append(Problem(path, event.start_mark.line + 1, message, unread=True))

    def value(self, path: Path, event: Any) -> Any:
        """The value that starts with `event`."""
        line = event.start_mark.line + 1
        if len(path) > MAX_DEPTH:
            raise Unreadable(line, TOO_DEEP)
        self.lines.setdefault(path, line)
        if isinstance(event, yaml.AliasEvent):
            alias = printable(str(event.anchor))
            return self.problem(path, event, f"aliases (*{alias}) are not supported; write out the value")
        if event.anchor:
            self.problem(path, event, f"anchors (&{printable(event.anchor)}) are not supported; write out each value")
        if event.tag:
            tag = printable(event.tag.replace("tag:yaml.org,2002:", "!!"))
            self.problem(path, event, f"tags ({tag}) are not supported; write a plain value")
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style or event.tag else self.plain(event.value)
        return self.sequence(path) if isinstance(event, yaml.SequenceStartEvent) else self.mapping(path)

    def sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value((*path, len(items)), event))
        return items

    def mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            key = self.value((*path, ""), event)
            here = (*path, key)
            if isinstance(key, str) and key not in items:
                self.lines[here] = line
                items[key] = self.value(here, next(self.events))
                continue
            if isinstance(key, str):
                self.problems.append(
                    Problem(here, line, f"given twice, in lines {self.lines[here]} and {line}; keep one")
                )
            elif isinstance(event, yaml.ScalarEvent):
                what = format_value(key)
                self.problem(path, event, f"a key must be text, {what} is not; if it is a name, put it in quotes")
            else:
                hint = 'a value that starts with a brace or bracket needs quotes: "{column}"'
                self.problem(path, event, f"a key must be text; {hint}")
            self.value((*path, ""), next(self.events))  # skipped
        return items

    def plain(self, word: str) -> Any:
        """The value of an unquoted word."""
        if _NULL.fullmatch(word):
            return None
        if _BOOL.fullmatch(word):
            return word.lower() == "true"
        if _INT.fullmatch(word) and len(word) <= 400:
            return int(word, 0 if word[1:2] in "ox" and len(word) > 2 else 10)
        if _FLOAT.fullmatch(word):
            return float(re.sub(r"\.(?=[infaINFA])", "", word))
        return word
