"""JSON and JSON Lines: the objects of a file as rows, each with its line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_ft.core.errors import DataError
from lora_ft.core.messages import printable
from lora_ft.data.delimited import OLD_MAC
from lora_ft.data.files import MAX_LINE, LongLine, open_bytes, text_lines
from lora_ft.data.json_objects import rows_of

WITH_DATA = 'fromstream(2|truncate_stream(inputs|select(.[0][0]=="data")))'  # of {"data": [...]}


class SourceRow(NamedTuple):
    """One row: its location for messages (`reviews.jsonl:17`), its values by column, or the problem if it has none."""

    where: str
    columns: dict[str, Any]
    problem: str = ""


def read_jsonl(path: Path, encoding: str) -> Iterator[SourceRow]:
    """The rows of a .jsonl file; blank lines are skipped."""
    name = printable(str(path))
    for number, line in enumerate(text_lines(path, encoding), 1):
        if line.strip():
            where = f"{name}:{number}"
            try:
                row = _json_row(json.loads(line), where)
            except (ValueError, RecursionError) as e:
                hint = OLD_MAC if "\r" in line.rstrip() else ""
                rule = "Each line of a .jsonl file must be one complete JSON object."
                row = SourceRow(where, {}, f"{_json_problem(e)}. {rule}{hint}")
            yield row


def read_json(path: Path, encoding: str) -> Iterator[SourceRow]:
    """A list of objects, an object that has them (also SQuAD's, by question), or JSON Lines, which many .json files contain."""
    name, text = printable(str(path)), _text(path, encoding)
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        yield from _json_array(text, start, name)
    elif start < len(text):
        value, end = _decode(text, start, name)
        if isinstance(value, dict) and text[end:].strip():
            yield from read_jsonl(path, encoding)
        else:
            for i, row in enumerate(rows_of(value if isinstance(value, dict) else {}, name), 1):
                yield from _squad(row, f"{name} row {i}") or [_json_row(row, f"{name} row {i}")]


def _text(path: Path, encoding: str) -> str:
    """The text of a .json file, which is decoded in memory. Raises DataError as soon as it is larger than MAX_LINE."""
    parts, size = [], 0
    try:
        for line in text_lines(path, encoding):
            parts.append(line)
            if (size := size + len(line)) > MAX_LINE:
                raise _too_large(path, encoding)
    except LongLine:
        raise _too_large(path, encoding) from None
    return "".join(parts)


def _too_large(path: Path, encoding: str) -> DataError:
    with open_bytes(path) as file:
        start = file.read(2**10).decode(encoding, "ignore").lstrip("\ufeff \t\r\n")[:1]
    way = "fromstream(1|truncate_stream(inputs))" if start == "[" else WITH_DATA
    one_each = "" if start == "[" else " If each line is an object already, name it .jsonl."
    return DataError(
        f"{printable(str(path))}: more than {MAX_LINE / 2**20:,.0f} MiB, the limit for a .json file. Write a row to a line: "
        f"jq -cn --stream '{way}' < OLD > NEW.jsonl.{one_each}"
    )


def _squad(article: Any, where: str) -> list[SourceRow]:
    """The questions of an article in SQuAD's nesting, as rows like those of the data set on the hub; [] of another object."""
    if not isinstance(article, dict) or not isinstance(article.get("paragraphs"), list):
        return []
    rows = []
    for p, paragraph in enumerate(article["paragraphs"], 1):
        questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
        for q, question in enumerate(questions if isinstance(questions, list) else [], 1):
            at = f"{where}, paragraph {p}, question {q}"
            answers = question.get("answers", []) if isinstance(question, dict) else None
            if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
                rows.append(SourceRow(at, {}, "a question needs a list of answers, each an object with a text"))
                continue
            keys = dict.fromkeys(["text", *(key for answer in answers for key in answer)])
            as_lists = {key: [answer[key] for answer in answers if key in answer] for key in keys}
            shared = {"title": article.get("title"), "context": paragraph.get("context")}
            rows.append(SourceRow(at, shared | question | {"answers": as_lists}))
    return rows


def _json_problem(error: Exception) -> str:
    """An error of the json module: bad syntax, a number of thousands of digits, or nesting thousands deep."""
    located = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return f"broken JSON: {located or error}"


def _json_row(value: Any, where: str) -> SourceRow:
    if isinstance(value, str):  # a list of texts
        return SourceRow(where, {"text": value})
    problem = f'a row must be a JSON object, {{"column": value, ...}}, not a {type(value).__name__}'
    return SourceRow(where, value) if isinstance(value, dict) else SourceRow(where, {}, problem)


def _json_array(text: str, start: int, name: str) -> Iterator[SourceRow]:
    """The elements of the array at `start`, decoded one at a time; `where` is the line each starts on."""
    separator = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")
    match = re.compile(r"\[[ \t\r\n]*(\]?)").match(text, start)
    line, counted = 1, 0
    while match and match[1] != "]":
        at = match.end()
        value, end = _decode(text, at, name)
        line, counted = line + text.count("\n", counted, at), at
        yield _json_row(value, f"{name}:{line}")
        match = separator.match(text, end)
        if match and not match[1]:
            raise DataError(f"{name}:{_line(text, match.end())}: broken JSON: ',' or ']' is missing.")
    if match and text[match.end() :].strip():
        raise DataError(f"{name}:{_line(text, match.end())}: broken JSON: there is text after the closing ']'.")


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _decode(text: str, start: int, name: str) -> tuple[Any, int]:
    """The JSON value at `start`, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line}: {_json_problem(e)}.") from e
