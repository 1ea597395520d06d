"""The types that settings have: what each accepts, how it is normalised, and a kind sentence for what it refuses.

A validator raises ValueError with the sentence; lists become tuples, so that a config is frozen all through.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from lora_ft.metric_names import TEXT_METRICS
from lora_ft.names import GROUPS, ROLES, nearest, nearest_role, shown, template_columns
from lora_ft.trainer_args import SCHEDULERS

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Scheduler = Literal[*SCHEDULERS]  # type: ignore[valid-type]
REPORTERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
MAX_LAYERS = 10_000


def _listed(value: Any) -> Any:
    """One text is a list of one; lists become tuples."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for n, value in enumerate(values):
        if value in values[:n]:
            raise ValueError(f"{shown(value)} is given twice; keep one")
    return values


def _name(text: str) -> str:
    if not text.strip() or any(ord(c) < 32 for c in text):
        raise ValueError(f"{shown(text)} is no name; give a path or a hub id")
    return text


def _role(word: str) -> str:
    if word in ROLES or word in GROUPS:
        return word
    if "," in word or " " in word.strip():
        raise ValueError(f"{shown(word)} is one word here; give a list, as in [q, v]")
    roles, groups = " ".join(ROLES), " ".join(GROUPS)
    raise ValueError(
        f"{shown(word)} is no role; nearest: {nearest_role(word)}. Roles are {roles}, groups {groups}; "
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
            raise ValueError(f"{shown(value)} is no range of layers; {hint}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= MAX_LAYERS:
            raise ValueError(f"{shown(value)} holds no layers; {hint}")
        return tuple(range(first, last + 1))
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{shown(value)} names no layers; {hint}")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_LAYERS:
            raise ValueError(f"{shown(number)} is no layer's number; {hint}")
    return tuple(sorted(_distinct(tuple(value))))


def _held_out(value: Any) -> Any:
    """Sources, or how much of the training data to hold out. Checks all there is: a union's own messages say little."""
    hint = "give a data source or several, a fraction below 1 (0.05), a count from 1 (500), or null"
    if isinstance(value, str | list | tuple):
        sources = _listed(value)
        if not sources or not all(isinstance(source, str) for source in sources):
            raise ValueError(f"{shown(value)} does not fit; {hint}")
        return _distinct(tuple(map(_name, sources)))
    fits = isinstance(value, float) and 0 < value < 1 or isinstance(value, int) and value >= 1
    if isinstance(value, bool) or not fits:
        raise ValueError(f"{shown(value)} does not fit; {hint}")
    return value


def _eval_sets(value: Any) -> Any:
    """data.eval: one set without a name, or a mapping of names to sets."""
    if not isinstance(value, dict):
        return None if value is None else _held_out(value)
    hint = "give names and their data, as in {dev: dev.jsonl, test: test.jsonl}"
    if not value:
        raise ValueError(f"names no eval set; {hint}")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(
                f"{shown(name)} is no name of an eval set, which is text of letters, digits, . _ -; {hint}"
            )
    return {name: _held_out(source) for name, source in value.items()}


def _steps(value: Any) -> Any:
    """Below 1 a fraction of the run, from 1 a count."""
    hint = "below 1 it is a fraction of the run (0.25), from 1 a count of steps, a whole number (100)"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{shown(value)} does not fit; {hint}")
    if value >= 1 and value != int(value):
        raise ValueError(f"{shown(value)} is neither; {hint}")
    return value if value < 1 else int(value)


def _steps_or_none(value: Any) -> Any:
    return 0 if not isinstance(value, bool) and value in (0, 0.0) else _steps(value)


def _micro_batch(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value != "auto" and not (whole and value >= 1):
        raise ValueError(f"{shown(value)} does not fit; give auto, or a whole number of tokens from 1")
    return value


def _reporters(value: Any) -> Any:
    return () if value == "none" else _listed(value)


def _reporter(word: str) -> str:
    if word not in REPORTERS:
        raise ValueError(f"{shown(word)} is not known; give some of {', '.join(REPORTERS)}, or [] for none")
    return word


def _text_metric(word: str) -> str:
    if word not in TEXT_METRICS:
        near = nearest(word, TEXT_METRICS)
        meant = f"did you mean {near}?" if near else f"give some of {', '.join(TEXT_METRICS)}"
        raise ValueError(f"{shown(word)} is no metric of texts; {meant}")
    return word


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
        raise ValueError(f"{shown(name)} is no column; give its bare name, as in `messages: messages`")
    return name


def _label_names(value: Any) -> Any:
    if value is None:
        return None
    hint = "give one column and its words by class id, as in {label: [negative, positive]}"
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{shown(value)} does not fit; {hint}")
    column, words = next(iter(value.items()))
    if not isinstance(words, list | tuple) or len(words) < 2:
        raise ValueError(f"two words at least; {hint}")
    for word in words:
        if not isinstance(word, str) or not word:
            raise ValueError(f"the word {shown(word)} is no text; {hint}, in quotes where it looks like something else")
    return {_column(column): _distinct(tuple(words))}


Name = Annotated[str, AfterValidator(_name)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
Targets = Annotated[
    tuple[Annotated[str, AfterValidator(_role)], ...], BeforeValidator(_listed), AfterValidator(_distinct)
]
Reporters = Annotated[
    tuple[Annotated[str, AfterValidator(_reporter)], ...], BeforeValidator(_reporters), AfterValidator(_distinct)
]
Template = Annotated[str, AfterValidator(_template)]
Supervised = Annotated[str, AfterValidator(_supervised)]
Column = Annotated[str, AfterValidator(_column)]
Steps = Annotated[int | float, BeforeValidator(_steps)]
StepsOrNone = Annotated[int | float, BeforeValidator(_steps_or_none)]
EvalSet = tuple[str, ...] | int | float
EvalSets = Annotated[EvalSet | dict[str, EvalSet] | None, BeforeValidator(_eval_sets)]
TextMetrics = Annotated[
    tuple[Annotated[str, AfterValidator(_text_metric)], ...], BeforeValidator(_listed), AfterValidator(_distinct)
]
Layers = Annotated[tuple[int, ...] | None, BeforeValidator(_layers)]
LabelNames = Annotated[dict[str, tuple[str, ...]] | None, BeforeValidator(_label_names)]
MicroBatch = Annotated[Literal["auto"] | int, BeforeValidator(_micro_batch)]
