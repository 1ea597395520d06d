"""The types of settings: what each accepts, how it is normalized, and a clear message for what it refuses.

A validator raises ValueError with the message; lists become tuples, so that a config is immutable. `json_schema` gives the
JSON Schema of what a validator accepts.
"""

import os
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from lora_ft.config.json_types import COUNT, FRACTION, NULL, POSITIVE, TEXT, json_schema, list_of, mapping, one_or_more
from lora_ft.config.training_arguments import SCHEDULERS
from lora_ft.core.messages import format_value
from lora_ft.core.metrics import TEXT_METRICS
from lora_ft.core.names import GROUPS, ROLES, nearest_role, template_columns, with_slashes

REPORTERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
MAX_LAYERS = 10_000
SET_NAME = "[A-Za-z0-9_.-]+"  # of an eval set
COLUMN = "^[^{}]+$"
GIVEN_TO_TEMPLATES = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")


def as_tuple(value: Any) -> Any:
    """A single text as a tuple of one, a list as a tuple; anything else as it is, for pydantic to refuse."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values as they are; a repeated one is refused."""
    for n, value in enumerate(values):
        if value in values[:n]:
            raise ValueError(f"{format_value(value)} is given twice; keep one")
    return values


def _name(text: str) -> str:
    if not text.strip() or any(ord(c) < 32 for c in text):
        hint = r"; in double quotes \t is a tab, in single quotes as it is written" if text.strip() else ""
        raise ValueError(f"{format_value(text)} is not a name; give a path or a hub id{hint}")
    return text


def _role(word: str) -> str:
    if word in ROLES or word in GROUPS:
        return word
    if "," in word or " " in word.strip():
        raise ValueError(f"{format_value(word)} is a single word; give a list, as in [q, v]")
    known = f"Roles are {' '.join(ROLES)}, groups are {' '.join(GROUPS)}; names of modules go in adapter.modules"
    raise ValueError(f"unknown role {format_value(word)}; did you mean {nearest_role(word)}? {known}")


def _layers(value: Any) -> Any:
    """None, or sorted layer numbers; "6-11" includes both ends."""
    hint = f'give null for all, a list such as [0, 1, 2], or a range such as "6-11" (from 0 to {MAX_LAYERS - 1})'
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,5})\s*(?:-\s*(\d{1,5}))?", value.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < MAX_LAYERS:
            raise ValueError(f"{format_value(value)} is not a range of layers; {hint}")
        return tuple(range(first, last + 1))
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{format_value(value)} does not name layers; {hint}")
    for number in value:
        if type(number) is not int or not 0 <= number < MAX_LAYERS:
            raise ValueError(f"{format_value(number)} is not a layer number; {hint}")
    return tuple(sorted(unique(tuple(value))))


def _steps(value: Any) -> Any:
    """A fraction of the run if below 1, otherwise a number of steps."""
    hint = "below 1 it is a fraction of the run (0.25), from 1 a number of steps, an integer (100)"
    if type(value) not in (int, float) or not 0 < value < float("inf") or value >= 1 and value != int(value):
        raise ValueError(f"{format_value(value)} is not valid; {hint}")
    return value if value < 1 else int(value)


def _steps_or_zero(value: Any) -> Any:
    return 0 if not isinstance(value, bool) and value in (0, 0.0) else _steps(value)


def _micro_batch_tokens(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError(f"{format_value(value)} is not valid; give auto, or a number of tokens, an integer from 1")
    return value


def _learning_rate(value: Any) -> Any:
    if value != "auto" and not (type(value) in (int, float) and 0 < value < float("inf")):
        raise ValueError(f"{format_value(value)} is not valid; give auto, or a number above 0, as 5e-4")
    return value


def _eval_set(value: Any) -> Any:
    """Data sources, or the part of the training data to hold out. Checks everything itself: a union's errors say little."""
    sources = as_tuple(value)
    if isinstance(sources, tuple) and sources and all(isinstance(source, str) for source in sources):
        return unique(tuple(with_slashes(_name(source)) for source in sources))
    if isinstance(value, float) and 0 < value < 1 or type(value) is int and value >= 1:
        return value
    hint = "give one or more data sources, a fraction below 1 (0.05), a number of rows from 1 (500), or null"
    raise ValueError(f"{format_value(value)} is not valid; {hint}")


def _eval_sets(value: Any) -> Any:
    """One eval set without a name, a mapping of names to sets, or None."""
    if not isinstance(value, dict):
        return None if value is None else _eval_set(value)
    hint = "give names and their data, as in {dev: dev.jsonl, test: test.jsonl}"
    if not value:
        raise ValueError(f"the mapping is empty; {hint}")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(SET_NAME, name):
            raise ValueError(f"eval set {format_value(name)}: a name has only letters, digits and . _ -; {hint}")
    return {name: _eval_set(source) for name, source in value.items()}


def _template(text: str) -> str:
    if not text:
        raise ValueError("is empty; give a text with columns in braces, as in {sentence}")
    template_columns(text)
    return text


def _supervised(text: str) -> str:
    if not template_columns(_template(text)):
        raise ValueError("names no column; put one in braces, as in {label}")
    return text


def _column(name: str) -> str:
    if not name or "{" in name or "}" in name:
        raise ValueError(f"{format_value(name)} is not a column; give its bare name, as in `messages: messages`")
    return name


def _label_names(value: Any) -> Any:
    """One column and its words, in the order of class ids."""
    if value is None:
        return None
    hint = "give one column and its words by class id, as in {label: [negative, positive]}"
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{format_value(value)} is not valid; {hint}")
    column, words = next(iter(value.items()))
    if not isinstance(words, list | tuple) or len(words) < 2:
        raise ValueError(f"needs at least two words; {hint}")
    for word in words:
        if not isinstance(word, str) or not word:
            raise ValueError(f"the word {format_value(word)} is not text; {hint}, each in quotes if needed")
    return {_column(column): unique(tuple(words))}


def _template_kwargs(value: Any) -> Any:
    """Settings of a chat template by name."""
    hint = "give names and values, as in {enable_thinking: false}"
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{format_value(value)} is not valid; {hint}")
    for name, item in value.items():
        if not isinstance(name, str) or not name.isidentifier() or name in GIVEN_TO_TEMPLATES:
            given = " (lora-ft gives it to the template itself)" if name in GIVEN_TO_TEMPLATES else ""
            raise ValueError(f"{format_value(name)} is not the name of a setting{given}; {hint}")
        if not isinstance(item, bool | int | float | str):
            raise ValueError(f"{name} is {format_value(item)}, not a text, number, true or false; {hint}")
    return value


def _roles(value: Any) -> Any:
    """Role in the rows -> role of the chat template."""
    hint = "give roles of the rows and what they are, as in {prompter: user}"
    words = [*value, *value.values()] if isinstance(value, dict) else [None]
    if value is not None and not (words and all(isinstance(word, str) and word for word in words)):
        raise ValueError(f"{format_value(value)} is not valid; {hint}")
    return value


_LAYER = {"type": "integer", "minimum": 0, "maximum": MAX_LAYERS - 1}
_RANGE = {"type": "string", "pattern": r"^\s*\d{1,5}\s*(-\s*\d{1,5}\s*)?$"}
_EVAL_SET = (TEXT, list_of(TEXT, minItems=1), FRACTION, COUNT)

T = TypeVar("T")
OneOrMore = Annotated[tuple[T, ...], BeforeValidator(as_tuple), AfterValidator(unique)]
EvalSet = tuple[str, ...] | int | float

Scheduler = Literal[*SCHEDULERS]  # type: ignore[valid-type]
Name = Annotated[str, AfterValidator(_name), json_schema(TEXT)]
Source = Annotated[Name, AfterValidator(with_slashes)]
Sources = Annotated[OneOrMore[Source], json_schema(TEXT, list_of(TEXT))]
LocalPath = Annotated[Source, AfterValidator(os.path.expanduser)]  # no shell expands a ~ in a config
Names = Annotated[OneOrMore[Name], json_schema(TEXT, list_of(TEXT))]
Targets = Annotated[OneOrMore[Annotated[str, AfterValidator(_role)]], json_schema(*one_or_more(*ROLES, *GROUPS))]
_LAYERS = json_schema(list_of(_LAYER, minItems=1), _RANGE, NULL)
Layers = Annotated[tuple[int, ...] | None, BeforeValidator(_layers), _LAYERS]
Steps = Annotated[int | float, BeforeValidator(_steps), json_schema(FRACTION, COUNT)]
StepsOrZero = Annotated[int | float, BeforeValidator(_steps_or_zero), json_schema(FRACTION, COUNT | {"minimum": 0})]
_AUTO_OR_COUNT = json_schema({"const": "auto"}, COUNT)
MicroBatchTokens = Annotated[Literal["auto"] | int, BeforeValidator(_micro_batch_tokens), _AUTO_OR_COUNT]
_RATE = json_schema({"const": "auto"}, POSITIVE)
LearningRate = Annotated[Literal["auto"] | float, BeforeValidator(_learning_rate), _RATE]
_OFF = BeforeValidator(lambda value: "off" if value is False else value)  # what YAML reads as false
AutoOrOff = Annotated[Literal["auto", "off"], _OFF]
_REPORTER = Literal[*REPORTERS]  # type: ignore[valid-type]
_NONE = BeforeValidator(lambda value: [] if value == "none" else value)
Reporters = Annotated[OneOrMore[_REPORTER], _NONE, json_schema({"const": "none"}, *one_or_more(*REPORTERS))]
_METRIC = Literal[*TEXT_METRICS]  # type: ignore[valid-type]
TextMetrics = Annotated[OneOrMore[_METRIC], json_schema(*one_or_more(*TEXT_METRICS))]
TemplateText = Annotated[str, AfterValidator(_template), json_schema(TEXT)]
Supervised = Annotated[str, AfterValidator(_supervised), json_schema(TEXT)]
Column = Annotated[str, AfterValidator(_column), json_schema(TEXT | {"pattern": COLUMN})]
EvalSets = Annotated[
    EvalSet | dict[str, EvalSet] | None,
    BeforeValidator(_eval_sets),
    json_schema(*_EVAL_SET, mapping(f"^{SET_NAME}$", {"anyOf": list(_EVAL_SET)}), NULL),
]
LabelNames = Annotated[
    dict[str, tuple[str, ...]] | None,
    BeforeValidator(_label_names),
    json_schema(mapping(COLUMN, list_of(TEXT, minItems=2), maxProperties=1), NULL),
]
Ranks = Annotated[
    dict[str, Annotated[int, Field(ge=1, le=65536)]],
    json_schema(mapping(".", COUNT | {"maximum": 65536}, minProperties=0)),
]
Alphas = Annotated[
    dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], json_schema(mapping(".", POSITIVE, minProperties=0))
]
TemplateKwargs = Annotated[
    dict[str, bool | int | float | str] | None,
    BeforeValidator(_template_kwargs),
    json_schema(mapping("^[A-Za-z_][A-Za-z0-9_]*$", {"type": ["boolean", "number", "string"]}), NULL),
]
Roles = Annotated[dict[str, str] | None, BeforeValidator(_roles), json_schema(mapping(".", TEXT), NULL)]
