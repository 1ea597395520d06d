"""The types that settings have: what each accepts, how it is normalised, and a kind sentence for what it refuses.

A validator raises ValueError with the sentence; lists become tuples, so that a config is frozen all through. `takes` says for
the JSON Schema what a validator lets through.
"""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from lora_ft.config.training_arguments import SCHEDULERS
from lora_ft.core.messages import format_value
from lora_ft.core.metrics import TEXT_METRICS
from lora_ft.core.names import GROUPS, ROLES, nearest, nearest_role

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Scheduler = Literal[*SCHEDULERS]  # type: ignore[valid-type]
REPORTERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
MAX_LAYERS = 10_000


def listed(value: Any) -> Any:
    """One text is a list of one; lists become tuples."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for n, value in enumerate(values):
        if value in values[:n]:
            raise ValueError(f"{format_value(value)} is given twice; keep one")
    return values


def name_of(text: str) -> str:
    if not text.strip() or any(ord(c) < 32 for c in text):
        raise ValueError(f"{format_value(text)} is no name; give a path or a hub id")
    return text


def _role(word: str) -> str:
    if word in ROLES or word in GROUPS:
        return word
    if "," in word or " " in word.strip():
        raise ValueError(f"{format_value(word)} is one word here; give a list, as in [q, v]")
    roles, groups = " ".join(ROLES), " ".join(GROUPS)
    raise ValueError(
        f"{format_value(word)} is no role; nearest: {nearest_role(word)}. Roles are {roles}, groups {groups}; "
        "the name of a module goes under adapter.modules"
    )


def _layers(value: Any) -> Any:
    """None, or layer numbers sorted; "6-11" holds both ends."""
    hint = f'give null for all, a list such as [0, 1, 2], or a range such as "6-11" (from 0 to {MAX_LAYERS - 1})'
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,5})\s*(?:-\s*(\d{1,5}))?", value.strip(), re.ASCII)
        if not match:
            raise ValueError(f"{format_value(value)} is no range of layers; {hint}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= MAX_LAYERS:
            raise ValueError(f"{format_value(value)} holds no layers; {hint}")
        return tuple(range(first, last + 1))
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{format_value(value)} names no layers; {hint}")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_LAYERS:
            raise ValueError(f"{format_value(number)} is no layer's number; {hint}")
    return tuple(sorted(distinct(tuple(value))))


def _steps(value: Any) -> Any:
    """Below 1 a fraction of the run, from 1 a count."""
    hint = "below 1 it is a fraction of the run (0.25), from 1 a count of steps, a whole number (100)"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{format_value(value)} does not fit; {hint}")
    if value >= 1 and value != int(value):
        raise ValueError(f"{format_value(value)} is neither; {hint}")
    return value if value < 1 else int(value)


def _steps_or_none(value: Any) -> Any:
    return 0 if not isinstance(value, bool) and value in (0, 0.0) else _steps(value)


def _micro_batch(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value != "auto" and not (whole and value >= 1):
        raise ValueError(f"{format_value(value)} does not fit; give auto, or a whole number of tokens from 1")
    return value


def _reporters(value: Any) -> Any:
    return () if value == "none" else listed(value)


def _reporter(word: str) -> str:
    if word not in REPORTERS:
        raise ValueError(f"{format_value(word)} is not known; give some of {', '.join(REPORTERS)}, or [] for none")
    return word


def _text_metric(word: str) -> str:
    if word not in TEXT_METRICS:
        near = nearest(word, TEXT_METRICS)
        meant = f"did you mean {near}?" if near else f"give some of {', '.join(TEXT_METRICS)}"
        raise ValueError(f"{format_value(word)} is no metric of texts; {meant}")
    return word


def takes(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema(kinds[0] if len(kinds) == 1 else {"anyOf": list(kinds)})


def list_of(item: dict[str, Any], **limits: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "uniqueItems": True, **limits}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
NULL: dict[str, Any] = {"type": "null"}
_ROLE = {"enum": [*ROLES, *GROUPS]}
_REPORTER = {"enum": list(REPORTERS)}
FRACTION = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
COUNT = {"type": "integer", "minimum": 1}
_LAYER = {"type": "integer", "minimum": 0, "maximum": MAX_LAYERS - 1}
_TEXT_METRIC = {"enum": list(TEXT_METRICS)}

Name = Annotated[str, AfterValidator(name_of), takes(TEXT)]
LocalPath = Annotated[Name, AfterValidator(os.path.expanduser)]  # no shell expands a ~ in a config
Names = Annotated[tuple[Name, ...], BeforeValidator(listed), AfterValidator(distinct), takes(TEXT, list_of(TEXT))]
Targets = Annotated[
    tuple[Annotated[str, AfterValidator(_role)], ...],
    BeforeValidator(listed),
    AfterValidator(distinct),
    takes(_ROLE, list_of(_ROLE)),
]
Reporters = Annotated[
    tuple[Annotated[str, AfterValidator(_reporter)], ...],
    BeforeValidator(_reporters),
    AfterValidator(distinct),
    takes({"const": "none"}, _REPORTER, list_of(_REPORTER)),
]
Steps = Annotated[int | float, BeforeValidator(_steps), takes(FRACTION, COUNT)]
StepsOrNone = Annotated[int | float, BeforeValidator(_steps_or_none), takes(FRACTION, COUNT | {"minimum": 0})]
TextMetrics = Annotated[
    tuple[Annotated[str, AfterValidator(_text_metric)], ...],
    BeforeValidator(listed),
    AfterValidator(distinct),
    takes(_TEXT_METRIC, list_of(_TEXT_METRIC)),
]
Layers = Annotated[
    tuple[int, ...] | None,
    BeforeValidator(_layers),
    takes(list_of(_LAYER, minItems=1), {"type": "string", "pattern": r"^\s*\d{1,5}\s*(-\s*\d{1,5}\s*)?$"}, NULL),
]
MicroBatch = Annotated[Literal["auto"] | int, BeforeValidator(_micro_batch), takes({"const": "auto"}, COUNT)]
