"""The JSON Schema of a config, and what it accepts in words, for error messages and the reference page."""

from functools import cache
from typing import Any

from lora_ft.config.schema import SECTIONS, Config


@cache
def config_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12): closed, with the description, default, bounds and choices of every setting."""
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        del section["title"]  # titles repeat the names
        for entry in section["properties"].values():
            for extra in ("title", "resume", "methods"):
                entry.pop(extra, None)
    for name in SECTIONS:
        schema["properties"][name].pop("default", None)  # the settings have theirs
    for entry in schema["$defs"]["TrainerConfig"]["properties"].values():
        del entry["default"]  # transformers' own
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lora-ft config"} | schema


def entry_at(path: tuple[str | int, ...]) -> dict[str, Any]:
    """The JSON Schema of the setting at a path such as ("adapter", "rank") or ("output",), or around it. Raises KeyError."""
    schema = config_schema()
    if len(path) > 1 and path[0] in SECTIONS:
        return schema["$defs"][SECTIONS[str(path[0])].__name__]["properties"][path[1]]
    return schema["properties"][path[0]]


def alternatives(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The kinds of values that a setting accepts."""
    return entry.get("anyOf", [entry])


def choices(entry: dict[str, Any]) -> list[str]:
    """The words that a setting, or an item of its list, may be."""
    kinds = [kind.get("items", kind) for kind in alternatives(entry)]
    return [word for kind in kinds for word in kind.get("enum", [kind["const"]] if "const" in kind else [])]


def accepted(entry: dict[str, Any]) -> str:
    """The values that a setting accepts, in words: `an integer from 1 to 65536`."""
    kinds = alternatives(entry)
    items = [kind["items"] for kind in kinds if kind.get("type") == "array"]
    # Beside a list, a single choice is not worth mentioning: it means a list of one.
    *words, last = [_in_words(kind) for kind in kinds if "enum" not in kind or kind not in items]
    return (", ".join(words) + (", or " if len(words) > 1 else " or ") if words else "") + last


def _in_words(kind: dict[str, Any]) -> str:
    if "const" in kind:
        return str(kind["const"])
    if "enum" in kind:
        return "one of " + ", ".join(kind["enum"])
    if kind["type"] == "array":
        return "a list of " + accepted(kind["items"]).removeprefix("one of ").replace("an integer", "integers")
    words = {
        "string": "text",
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
        "object": "a mapping (key: value)",
    }[kind["type"]]
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "and below"}
    return " ".join([words, *(f"{word} {kind[bound]}" for bound, word in bounds.items() if bound in kind)])
