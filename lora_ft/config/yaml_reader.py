"""A strict reader of YAML: plain data and the line of every key, or everything that is wrong.

YAML 1.2's reading of plain words (1e-4 is a number; `no`, `on`, 12:30, 2024-01-01 are text), and only what a config
needs: no repeated keys, tags, anchors or aliases; bounded size and depth. It sits on PyYAML's parser and builds the
values itself, so nothing a file says can construct an object.
"""

import re
from typing import Any, NamedTuple

from yaml.error import MarkedYAMLError
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.scanner import Scanner

from lora_ft.core.messages import format_value, printable

MAX_BYTES = 128 * 1024
MAX_DEPTH = 20
TOO_LARGE = f"too large; a config has at most {MAX_BYTES // 1024} KiB"

Path = tuple[str | int, ...]  # ("adapter", "targets", 1)

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Problem(NamedTuple):
    path: Path
    line: int
    message: str
    unread: bool = False  # the setting at `path` has no value to validate (a section keeps its other settings)


class Document(NamedTuple):
    value: Any
    lines: dict[Path, int]  # where each key and list item stands, from 1
    problems: list[Problem]


class Unreadable(Exception):
    """Not YAML at all, too deep or too large."""

    def __init__(self, line: int | None, message: str):
        super().__init__(message)
        self.line, self.message = line, message


def read(text: str) -> Document:
    """Parse one document. An empty one has the value None.

    Raises:
        Unreadable: with the line, where there is one.
    """
    if len(text) > MAX_BYTES:
        raise Unreadable(None, TOO_LARGE)
    try:
        return _Builder(_Events(text)).document()
    except ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise Unreadable(line, f"the character {printable(chr(e.character))} is not allowed in YAML") from None
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise Unreadable(mark.line + 1 if mark else None, _plain_words(e)) from None
    except (ValueError, OverflowError):  # PyYAML's chr(): \UFFFFFFFF in quotes is no character
        raise Unreadable(None, "an escape code (\\U...) in quotes is no character") from None


def _plain_words(e: MarkedYAMLError) -> str:
    problem = printable(e.problem or e.context or "cannot be read")
    hint = ""
    if "mapping values are not allowed" in problem:
        hint = '; a text with ": " in it needs quotes'
    elif "'\\t'" in problem or "\\t" in problem:
        hint = "; YAML indents with spaces, not tabs"
    elif "block end" in problem:
        hint = "; the indentation does not fit the lines above"
    elif "cannot start any token" in problem:
        hint = "; a text that begins with this character needs quotes"
    column = f" (column {e.problem_mark.column + 1})" if e.problem_mark else ""
    return f"not valid YAML: {problem}{column}{hint}"


class _Events(Reader, Scanner, Parser):
    """PyYAML's events of a text. Depth is bounded in the scanner: what is deeper is never looked at."""

    def __init__(self, text: str):
        Reader.__init__(self, text.removeprefix("\ufeff"))
        Scanner.__init__(self)
        Parser.__init__(self)

    def _bound(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Unreadable(self.line + 1, f"nested more than {MAX_DEPTH} deep; a config never is")

    def add_indent(self, column: int) -> bool:
        self._bound(len(self.indents))
        return super().add_indent(column)

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        self._bound(self.flow_level)
        super().fetch_flow_collection_start(TokenClass)


class _Builder:
    """Values, lines and problems out of events."""

    def __init__(self, events: _Events):
        self.events = events
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []

    def document(self) -> Document:
        self.events.get_event()  # the stream's start
        value = None
        if self.events.check_event(DocumentStartEvent):
            self.events.get_event()
            value = self.value(())
            self.events.get_event()
        if self.events.check_event(DocumentStartEvent):
            line = self.events.peek_event().start_mark.line + 1
            raise Unreadable(line, "a second document begins here (---); a config is one document")
        return Document(value, self.lines, self.problems)

    def problem(self, path: Path, event: Any, message: str) -> None:
        self.problems.append(Problem(path, event.start_mark.line + 1, message, unread=len(path) > 1))

    def value(self, path: Path) -> Any:
        event = self.events.get_event()
        self.lines.setdefault(path, event.start_mark.line + 1)
        if isinstance(event, AliasEvent):
            return self.problem(
                path, event, f"aliases (*{printable(str(event.anchor))}) are not read; write the value out"
            )
        if event.anchor:
            self.problem(path, event, f"anchors (&{printable(event.anchor)}) are not read; write each value out")
        if event.tag:
            tag = printable(event.tag.replace("tag:yaml.org,2002:", "!!"))
            self.problem(path, event, f"tags ({tag}) are not read, and nothing is run; write a plain value")
        if isinstance(event, ScalarEvent):
            plain = event.style is None and not event.tag
            return self.plain(path, event) if plain else event.value
        if isinstance(event, SequenceStartEvent):
            return self.sequence(path)
        return self.mapping(path)

    def sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not self.events.check_event(SequenceEndEvent):
            items.append(self.value((*path, len(items))))
        self.events.get_event()
        return items

    def mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not self.events.check_event(MappingEndEvent):
            event = self.events.peek_event()
            line = event.start_mark.line + 1
            key = self.value((*path, ""))
            self.lines.pop((*path, ""))
            if not isinstance(key, str):
                at = f"a key must be text, {format_value(key)} is not; if it is a name, put it in quotes"
                if not isinstance(event, ScalarEvent):
                    at = (
                        'a key must be plain text; a value that begins with a brace or bracket needs quotes: "{column}"'
                    )
                self.problem(path, event, at)
                self.value((*path, ""))
                self.lines.pop((*path, ""), None)
                continue
            here = (*path, key)
            if key in items:
                message = f"given twice, in line {self.lines[here]} and in line {line}; keep one"
                self.problems.append(Problem(here, line, message))
                _Builder(self.events).value(here)  # read past it: the first stands
                continue
            self.lines[here] = line
            items[key] = self.value(here)
        self.events.get_event()
        return items

    def plain(self, path: Path, event: ScalarEvent) -> Any:
        word = event.value
        if _NULL.fullmatch(word):
            return None
        if _BOOL.fullmatch(word):
            return word.lower() == "true"
        if _INT.fullmatch(word) and len(word) <= 400:
            return int(word, 0 if word[1:2] in "ox" and len(word) > 2 else 10)
        if _FLOAT.fullmatch(word):
            return float(re.sub(r"\.(?=[infaINFA])", "", word))
        return word
