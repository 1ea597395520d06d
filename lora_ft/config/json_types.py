"""Words of the JSON Schema of settings, for types that validators check."""

from typing import Any

from pydantic import WithJsonSchema


def json_schema(*alternatives: dict[str, Any]) -> WithJsonSchema:
    """The JSON Schema of a type whose validators accept any of these."""
    return WithJsonSchema(alternatives[0] if len(alternatives) == 1 else {"anyOf": list(alternatives)})


def list_of(item: dict[str, Any], **limits: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "uniqueItems": True, **limits}


def one_or_more(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    word = {"enum": list(words)}
    return word, list_of(word)


def mapping(pattern: str, value: dict[str, Any], **limits: Any) -> dict[str, Any]:
    keys = {"minProperties": 1, "patternProperties": {pattern: value}, "additionalProperties": False}
    return {"type": "object", **keys, **limits}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
NULL: dict[str, Any] = {"type": "null"}
FRACTION = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
POSITIVE = {"type": "number", "exclusiveMinimum": 0}
COUNT = {"type": "integer", "minimum": 1}
