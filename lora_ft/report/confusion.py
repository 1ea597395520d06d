"""Confusion tables that stay readable with many labels: the matrix, each label's share of right rows, and what is mixed up."""

from typing import Any

from lora_ft.report.runs import RunData

WORDS_AS_COLUMNS = 3  # labels; more are numbered, and have a table of their own
MIX_UPS = 8
MAX_WORD = 40  # characters


def confusion_tables(run: RunData, set_name: str) -> dict[str, Any]:
    """Of an eval set: `matrices` of base and adapter, `labels` (a row per label), `mix_ups`; {} if it is no classification."""
    both = {"base": run.base_metrics.get(set_name, {}), "adapter": run.metrics.get(set_name, {})}
    counts = {who: of["confusion"] for who, of in both.items() if of.get("confusion")}
    if not counts:
        return {}
    size = len(next(iter(counts.values())))
    counts = {who: of for who, of in counts.items() if len(of) == size}
    words = label_words(run, size)
    columns = words if len(words) <= WORDS_AS_COLUMNS else [str(i) for i in range(1, len(words) + 1)]
    matrices = [{"who": who, "rows": _shaded(of)} for who, of in counts.items()]
    found: dict[str, Any] = {"words": words, "columns": columns, "matrices": matrices, "labels": [], "mix_ups": []}
    if len(words) > WORDS_AS_COLUMNS:
        found["labels"] = [[(sum(row), row[i]) for row in (of[i] for of in counts.values())] for i in range(len(words))]
        found["mix_ups"] = _mix_ups(counts)
    return found


def label_words(run: RunData, count: int) -> list[str]:
    """The words of the labels, shortened."""
    named = (run.record["config"]["data"].get("label_names") or {}).values()
    names: list[str] = next((words for words in named if isinstance(words, list)), [])
    words = [str(names[i]) if i < len(names) else str(i) for i in range(count)]
    return [shortened(word) or "(empty)" for word in words]


def shortened(word: str, limit: int = MAX_WORD) -> str:
    """A name on one line of at most `limit` characters."""
    word = " ".join(word.split())
    return word if len(word) <= limit else f"{word[: limit - 1]}\u2026"


def _shaded(counts: list[list[int]]) -> list[list[dict[str, Any]]]:
    """Per cell its count, its share of its row for shading, and whether it is on the diagonal."""
    return [
        [{"count": n, "share": round(n / max(1, sum(row)), 3), "right": i == j} for j, n in enumerate(row)]
        for i, row in enumerate(counts)
    ]


def _mix_ups(counts: dict[str, list[list[int]]]) -> list[tuple[int, int, list[int]]]:
    """(true, predicted, counts of base and adapter) where the last model is wrong most often."""
    *_, last = counts.values()
    wrong = [(i, j) for i, row in enumerate(last) for j, n in enumerate(row) if i != j and n]
    wrong.sort(key=lambda at: -last[at[0]][at[1]])
    return [(i, j, [of[i][j] for of in counts.values()]) for i, j in wrong[:MIX_UPS]]
