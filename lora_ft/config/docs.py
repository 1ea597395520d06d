"""The config's JSON Schema, for editors, and its reference page, both made of the schema's own words. Imports no torch."""

import json
from typing import Any

from lora_ft.config import training_arguments
from lora_ft.config.problems import SECTIONS, field_at
from lora_ft.config.schema import Config

FILE = "lora-ft.schema.json"  # beside a config that names it in its first line
HEADER = "# yaml-language-server: $schema="

RESUME = {
    "result": "refused",
    "rounding": "goes on, with a warning",
    "free": "goes on",
    "longer": "goes on; the schedule is derived again",
}
PAGE = """# Every setting of a config

Made by `lora-ft schema --markdown` from the schema's own descriptions; a test keeps it equal.

A config is strict: an unknown or repeated key is an error with its line and the nearest valid name, and all errors are told at
once. `1e-4` is a number. Paths are resolved against the current folder. `--set section.setting=value` on the command line beats
the file, the file beats the defaults. The last column says what becomes of `lora-ft train CONFIG --resume` after a change.

For completion and checks while you type, an editor with a YAML language server (VS Code's YAML extension, for one) reads the
config's first line, `# yaml-language-server: $schema=lora-ft.schema.json`. It names a file beside the config: `lora-ft init`
writes both, and `lora-ft schema > lora-ft.schema.json` the file alone.
"""
TRAINER = """
## trainer

Other fields of [transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), by their own
names and with their own defaults.

| field | takes | `--resume` after a change |
|---|---|---|
"""


def schema_text() -> str:
    """The JSON Schema as a file has it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a config: closed, with every setting's description, default, range and words."""
    schema = _plain(Config.model_json_schema())
    properties = schema["properties"]
    for name in SECTIONS:
        properties[name] = {"$ref": properties[name]["$ref"]}  # its default is its settings' defaults
    properties["trainer"] |= {
        "properties": {name: _allowed(allowed) for name, allowed in training_arguments.ALLOWED.items()},
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora-ft config",
        "description": "The settings of one fine-tuning run.",
    } | schema


def reference() -> str:
    """The reference page: a table a section, in Markdown."""
    schema = json_schema()
    page = [PAGE]
    for section, model in SECTIONS.items():
        properties = schema["$defs"][model.__name__]["properties"]
        page.append(
            f"\n## {section}\n\n| setting | default | takes | what it is | `--resume` after a change |\n|---|---|---|---|---|\n"
        )
        page += [_row((section, name), entry) for name, entry in properties.items()]
    page.append(
        "\n## output\n\n| setting | default | takes | what it is | `--resume` after a change |\n|---|---|---|---|---|\n"
    )
    page.append(_row(("output",), schema["properties"]["output"]))
    page.append(TRAINER)
    for name, allowed in training_arguments.ALLOWED.items():
        page.append(f"| `{name}` | {_cell(training_arguments.wanted(allowed))} | {RESUME[allowed.resume]} |\n")
    page.append("\nOf the rest, some are settings above:\n\n| field | setting |\n|---|---|\n")
    page += [f"| `{name}` | `{ours}` |\n" for name, ours in training_arguments.OURS.items()]
    page.append("\nand some can't be set:\n\n| field | why |\n|---|---|\n")
    page += [f"| `{name}` | {_cell(why)} |\n" for name, why in training_arguments.REFUSED.items()]
    return "".join(page)


def _row(path: tuple[str, ...], entry: dict[str, Any]) -> str:
    extra = field_at(path).json_schema_extra
    assert isinstance(extra, dict)
    default = f"`{json.dumps(entry['default'])}`" if "default" in entry else "required"
    cells = (f"`{path[-1]}`", default, takes(entry), entry["description"], RESUME[str(extra["resume"])])
    return "| " + " | ".join(map(_cell, cells)) + " |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def takes(entry: dict[str, Any]) -> str:
    """What a property of the schema takes, in words."""
    if "anyOf" in entry:
        kinds = [kind for kind in entry["anyOf"] if not _same_as_list(kind, entry["anyOf"])]
        return " or ".join(dict.fromkeys(map(takes, kinds)))
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{word}`" for word in entry["enum"])
    if entry["type"] == "array":
        return f"a list of {takes(entry['items'])}"
    words = {
        "string": "text",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "`true` or `false`",
        "null": "`null`",
        "object": "a mapping",
    }[entry["type"]]
    low = f" from {entry['minimum']}" if "minimum" in entry else ""
    low += f" above {entry['exclusiveMinimum']}" if "exclusiveMinimum" in entry else ""
    high = f" to {entry['maximum']}" if "maximum" in entry else ""
    high += f" below {entry['exclusiveMaximum']}" if "exclusiveMaximum" in entry else ""
    return words + low + (" and" if low and "below" in high else "") + high


def _same_as_list(kind: dict[str, Any], kinds: list[dict[str, Any]]) -> bool:
    """One word where a list of one is meant: not worth a word beside the list, if it takes the same words."""
    return "enum" in kind and any(kind["enum"] == other.get("items", {}).get("enum") for other in kinds)


def _plain(schema: Any) -> Any:
    """Without pydantic's titles, which repeat the names, and our own notes on --resume."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    named = schema.get("properties")  # a setting may be called title
    plain = {
        key: _plain(value) for key, value in schema.items() if key not in ("title", "resume", "methods", "properties")
    }
    return plain | ({"properties": {name: _plain(entry) for name, entry in named.items()}} if named else {})


def _allowed(allowed: training_arguments.Allowed) -> dict[str, Any]:
    description = f"transformers.TrainingArguments; {training_arguments.wanted(allowed)}"
    if isinstance(allowed.kind, tuple):
        return {"enum": list(allowed.kind), "description": description}
    kind = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}[allowed.kind]
    low = {"minimum": allowed.low} if allowed.low > float("-inf") else {}
    high = {"exclusiveMaximum": allowed.high} if allowed.high < float("inf") else {}
    return {"type": kind, "description": description} | low | high
