"""A few rows of a classification that tell what training changed: those that only one of base and adapter has right."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_ft.core.metrics import split_set_name
from lora_ft.data.examples import Examples, column_array
from lora_ft.evaluation.paired import Rows

SHOWN = 4  # rows of each kind
HEAD, TAIL = 400, 200  # characters of a long prompt
KEY = "rows"  # among the metrics of a training run's evaluation


def telling_rows(base: Rows, own: Rows) -> dict[str, dict]:
    """{KEY: kind -> {count, places: [example, base's answer, adapter's answer] of some, spread over the data}}.

    Answers are places in the label words. Kinds: "fixed" and "broken" by the adapter, "both wrong"; without the base's rows
    "wrong", with None for its answer. {} for a set that is not a classification.
    """
    if "macro_f1" not in own:
        return {}
    label, answer = own["macro_f1"].astype(int).T
    right = answer == label
    if base:
        before = base["macro_f1"][:, 1].astype(int)
        was_right = before == label
        kinds = {"fixed": right & ~was_right, "broken": ~right & was_right, "both wrong": ~right & ~was_right}
    else:
        before, kinds = None, {"wrong": ~right}
    found = {}
    for kind, of_kind in kinds.items():
        places, count = np.flatnonzero(of_kind).tolist(), int(of_kind.sum())
        some = [places[i * count // min(SHOWN, count)] for i in range(min(SHOWN, count))]
        answers = [[i, None if before is None else int(before[i]), int(answer[i])] for i in some]
        found[kind] = {"count": count, "places": answers}
    return {KEY: found}


def describe_rows(metrics: dict, eval_sets: Mapping[str, Examples]) -> list[dict[str, Any]]:
    """The rows that a run's metrics name, as texts: set, kind, count, and of each row where, prompt, label, base, adapter."""
    described = []
    for name, of_set in split_set_name(metrics, [name for name in eval_sets if name]).items():
        for kind, found in (of_set.get(KEY) or {}).items():
            rows = [_described(eval_sets[name], *place) for place in found["places"]]
            described.append({"set": name, "kind": kind, "count": found["count"], "rows": rows})
    return described


def _described(examples: Examples, place: int, base: int | None, adapter: int) -> dict[str, str]:
    row, words = examples.dataset[place], examples.label_words
    text = examples.texts[int(np.searchsorted(column_array(examples.texts, "row"), row["row"]))]
    answers = {"label": row["label"], "base": base, "adapter": adapter}
    texts = {who: words[answer] for who, answer in answers.items() if answer is not None}
    return {"where": row["where"], "prompt": _shortened(text["prompt"])} | texts


def _shortened(text: str) -> str:
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD].rstrip()} \u2026 {text[-TAIL:].lstrip()}"
