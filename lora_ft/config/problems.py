"""What is wrong with a config, in plain words: what the schema refuses, and the rules between settings."""

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lora_ft.config import training_arguments
from lora_ft.config.adapter_settings import AdapterConfig
from lora_ft.config.schema import Config, DataConfig, GenerationConfig, ModelConfig, TrainConfig
from lora_ft.core.messages import format_value
from lora_ft.core.names import nearest

SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "generation": GenerationConfig,
}

Place = tuple[str, ...]  # ("data", "eval")


def refused(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str, Place | None]]:
    """What the schema refuses: (path, sentence, the setting that was probably meant where the name is unknown)."""
    try:
        Config.model_validate(data)
        errors = []
    except ValidationError as e:
        errors = e.errors(include_url=False)
    meant = set()
    for error in sorted(
        errors, key=lambda error: error["type"] != "extra_forbidden"
    ):  # misspelt names before missing ones
        path = error["loc"]
        if error["type"] == "extra_forbidden":
            sentence, place = unknown(tuple(map(str, path)))
            meant.add(place)
            yield path, sentence, place
        elif error["type"] != "missing":
            yield path, _sentence(path, error), None
        elif path not in meant:
            yield path, f"missing; give {field_at(path).description}", None
    if isinstance(data.get("trainer"), Mapping):
        for name, sentence in training_arguments.problems(data["trainer"]):
            yield ("trainer", name), sentence, None


def field_at(path: tuple[str | int, ...]) -> FieldInfo:
    """The schema's field that a path leads to, or into."""
    fields = Config.model_fields
    if path[0] in SECTIONS and len(path) > 1:
        fields = SECTIONS[str(path[0])].model_fields
        return fields[str(path[1])]
    return fields[str(path[0])]


def unknown(path: Place) -> tuple[str, Place | None]:
    """(what to say of a name that is no setting, the setting that was probably meant)."""
    if len(path) == 3 and (path[:2] == ("trainer", "lr_scheduler_kwargs") or path[:2] == ("data", "label_names")):
        return f"is given whole, as in --set '{'.'.join(path[:2])}={{{path[2]}: ...}}'", None
    section, name = path[:-1], path[-1]
    siblings = SECTIONS[section[0]].model_fields if section and section[0] in SECTIONS else Config.model_fields
    places: dict[str, Place] = {}  # by last name
    for place in [(s, n) for s, model in SECTIONS.items() for n in model.model_fields]:
        places.setdefault(place[1], place)
    places |= {n: tuple(ours.split(".")) for n, ours in training_arguments.OURS.items() if n not in places}
    places |= {n: ("trainer", n) for n in training_arguments.ALLOWED}
    if name not in places and (near := nearest(name, siblings)):
        return f"no such setting; did you mean {near}?", (*section, near)
    if near := name if name in places else nearest(name, places):
        return f"no such setting here; did you mean {'.'.join(places[near])}?", places[near]
    return f"no such setting; here are {', '.join(siblings)}", None


def _sentence(path: tuple[str | int, ...], error: Any) -> str:
    if error["type"] == "value_error":  # a sentence of lora_ft.config.types
        return str(error["ctx"]["error"])
    value, field = error["input"], field_at(path)
    if len(path) == 1 and path[0] in SECTIONS:
        return f"{format_value(value)} is no section; its settings stand below it, as in {_EXAMPLES[str(path[0])]}"
    if error["type"] == "too_short":
        return f"is empty; give {field.description}"
    hint = ""
    wants = wanted(field)
    if value is None:
        hint = "; leave it out for the default"
    elif "text" in wants and isinstance(value, Mapping):
        hint = '; a text that begins with a brace needs quotes: "{column}"'
    elif "text" in wants and not isinstance(value, list | tuple):
        hint = "; if it is meant as text, put it in quotes"
    elif isinstance(value, str):
        words = wants.removeprefix("one of ").split(", ")
        if near := nearest(_LONG.get(value, value), words):
            hint = f"; did you mean {near}?"
    return f"{format_value(value)} does not fit; give {wants}{hint}"


_LONG = {"fp16": "float16", "half": "float16", "fp32": "float32", "bf16": "bfloat16"}  # too unlike to be near
_EXAMPLES = {
    "model": "model: {name: gpt2}",
    "adapter": "adapter: {rank: 8}",
    "data": "data: {train: reviews.jsonl}",
    "train": "train: {learning_rate: 1e-4}",
    "generation": "generation: {metrics: [bleu]}",
}


def wanted(field: FieldInfo) -> str:
    """What a field takes, in words, by its type and range."""
    kind, null = plain_type(field)
    low, high = "", ""
    for limit in field.metadata:
        ge, gt, le, lt = (getattr(limit, name, None) for name in ("ge", "gt", "le", "lt"))
        low = f" from {ge}" if ge is not None else f" above {gt}" if gt is not None else low
        high = f" to {le}" if le is not None else f" below {lt}" if lt is not None else high
    if get_origin(kind) is Literal:
        words = "one of " + ", ".join(get_args(kind))
    else:
        base = get_origin(kind) or kind
        words = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "text",
            tuple: "a list of text",
            dict: "a mapping (key: value)",
        }[base]
        words += low + (f", and{high}" if "below" in high and low else high)
    return words + (" or null" if null else "")


def plain_type(field: FieldInfo) -> tuple[Any, bool]:
    """(the type without `| None` and annotations, whether it may be null); of several types, their Union."""
    kinds = (
        get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else [field.annotation]
    )
    others = [kind for kind in kinds if kind is not type(None)]
    kind = others[0] if len(others) == 1 else Union[tuple(others)]  # noqa: UP007
    return (get_args(kind)[0] if get_origin(kind) is Annotated else kind), len(others) < len(kinds)
