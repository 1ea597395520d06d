"""The types that settings about data have: sources and eval sets, templates, label words."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from lora_ft.config.types import COUNT, FRACTION, NULL, TEXT, distinct, list_of, listed, name_of, takes
from lora_ft.core.messages import format_value
from lora_ft.core.names import template_columns

_SET_NAME = "[A-Za-z0-9_.-]+"  # of an eval set
_COLUMN = "^[^{}]+$"


def _held_out(value: Any) -> Any:
    """Sources, or how much of the training data to hold out. Checks all there is: a union's own messages say little."""
    hint = "give a data source or several, a fraction below 1 (0.05), a count from 1 (500), or null"
    if isinstance(value, str | list | tuple):
        sources = listed(value)
        if not sources or not all(isinstance(source, str) for source in sources):
            raise ValueError(f"{format_value(value)} does not fit; {hint}")
        return distinct(tuple(map(name_of, sources)))
    fits = isinstance(value, float) and 0 < value < 1 or isinstance(value, int) and value >= 1
    if isinstance(value, bool) or not fits:
        raise ValueError(f"{format_value(value)} does not fit; {hint}")
    return value


def _eval_sets(value: Any) -> Any:
    """data.eval: one set without a name, or a mapping of names to sets."""
    if not isinstance(value, dict):
        return None if value is None else _held_out(value)
    hint = "give names and their data, as in {dev: dev.jsonl, test: test.jsonl}"
    if not value:
        raise ValueError(f"names no eval set; {hint}")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(_SET_NAME, name):
            raise ValueError(
                f"{format_value(name)} is no name of an eval set, which is text of letters, digits, . _ -; {hint}"
            )
    return {name: _held_out(source) for name, source in value.items()}


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
        raise ValueError(f"{format_value(name)} is no column; give its bare name, as in `messages: messages`")
    return name


def _label_names(value: Any) -> Any:
    if value is None:
        return None
    hint = "give one column and its words by class id, as in {label: [negative, positive]}"
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{format_value(value)} does not fit; {hint}")
    column, words = next(iter(value.items()))
    if not isinstance(words, list | tuple) or len(words) < 2:
        raise ValueError(f"two words at least; {hint}")
    for word in words:
        if not isinstance(word, str) or not word:
            raise ValueError(
                f"the word {format_value(word)} is no text; {hint}, in quotes where it looks like something else"
            )
    return {_column(column): distinct(tuple(words))}


_EVAL_SET = (TEXT, list_of(TEXT, minItems=1), FRACTION, COUNT)

Template = Annotated[str, AfterValidator(_template), takes(TEXT)]
Supervised = Annotated[str, AfterValidator(_supervised), takes(TEXT)]
Column = Annotated[str, AfterValidator(_column), takes(TEXT | {"pattern": _COLUMN})]
EvalSet = tuple[str, ...] | int | float
EvalSets = Annotated[
    EvalSet | dict[str, EvalSet] | None,
    BeforeValidator(_eval_sets),
    takes(
        *_EVAL_SET,
        {
            "type": "object",
            "minProperties": 1,
            "patternProperties": {f"^{_SET_NAME}$": {"anyOf": list(_EVAL_SET)}},
            "additionalProperties": False,
        },
        NULL,
    ),
]
LabelNames = Annotated[
    dict[str, tuple[str, ...]] | None,
    BeforeValidator(_label_names),
    takes(
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "patternProperties": {_COLUMN: list_of(TEXT, minItems=2)},
            "additionalProperties": False,
        },
        NULL,
    ),
]
