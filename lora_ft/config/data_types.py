"""The types of `data.format` and `data.messages`: what each accepts, and a clear message for what it refuses."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from lora_ft.config.json_types import NULL, TEXT, json_schema, list_of
from lora_ft.config.types import COLUMN, unique
from lora_ft.core.messages import format_value
from lora_ft.core.names import template_columns

FORMAT_KEYS = ("encoding", "separator", "quote", "escape", "header")
ROLE = "^[^{}]+$"


def _file_format(value: Any) -> Any:
    """How text files are written: one character each, an encoding that Python knows, the names of columns."""
    hint = 'give some of separator, encoding, quote, escape and header, as in {separator: ";", encoding: cp1252}'
    if value is None:
        return None
    if not isinstance(value, dict) or not value or not set(value) <= set(FORMAT_KEYS):
        raise ValueError(f"{format_value(value)} is not valid; {hint}")
    for name, item in value.items():
        if name == "header":
            if not isinstance(item, list | tuple) or not item or not all(isinstance(c, str) and c for c in item):
                raise ValueError(f"header is {format_value(item)}, not a list of column names; {hint}")
            unique(tuple(item))
        elif name == "encoding":
            try:
                "".encode(item)
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"{format_value(item)} is not an encoding, such as utf-8, cp1252 or utf-16") from None
        elif not (
            isinstance(item, str) and (len(item) == 1 and item not in "\r\n" or (name, item) == ("quote", "none"))
        ):
            raise ValueError(f"{name} is {format_value(item)}, not a single character; {hint}")
    return {name: tuple(item) if name == "header" else item for name, item in value.items()}


def _messages(value: Any) -> Any:
    """A column, or a list of columns and of turns {role: text with columns in braces}."""
    hint = (
        'give its bare name, as in `messages: messages`, or a list, as in [history, {user: "{q}"}, {assistant: "{a}"}]'
    )
    if isinstance(value, str) or value is None:
        if value is not None and (not value or "{" in value or "}" in value):
            raise ValueError(f"{format_value(value)} is not a column; {hint}")
        return value
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise ValueError(f"{format_value(value)} is not valid; {hint}")
    for part in value:
        if isinstance(part, dict) and len(part) == 1 and all(isinstance(w, str) and w for w in (*part, *part.values())):
            template_columns(next(iter(part.values())))
        elif not isinstance(part, str) or not part or "{" in part or "}" in part:
            raise ValueError(f"{format_value(part)} is neither a column nor one turn {{role: text}}; {hint}")
    return tuple(value)


FORMAT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "minProperties": 1,
    "properties": {name: list_of(TEXT, minItems=1) if name == "header" else TEXT for name in FORMAT_KEYS},
    "additionalProperties": False,
}
TURN = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": TEXT}
PART = {"anyOf": [{"type": "string", "pattern": COLUMN}, TURN]}
Format = Annotated[dict[str, Any] | None, BeforeValidator(_file_format), json_schema(FORMAT_SCHEMA, NULL)]
Messages = Annotated[
    str | tuple[str | dict[str, str], ...] | None,
    BeforeValidator(_messages),
    json_schema({"type": "string", "pattern": COLUMN}, {"type": "array", "items": PART, "minItems": 2}, NULL),
]
