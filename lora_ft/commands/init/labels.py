"""The labels of a classification in a data file: which column has them, and the words of its classes."""

from typing import Any

Rows = list[dict[str, Any]]
CLASSES = 20  # of a label, at most
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "target", "rating", "stars")


def values_of(rows: Rows, name: str) -> list[Any]:
    return [value for row in rows if (value := row.get(name)) is not None and value != ""]


def is_label(rows: Rows, name: str) -> bool:
    """Few distinct short values, each of several rows (of a column called label: of one)."""
    values = values_of(rows, name)
    if not values or not all(isinstance(v, str | int) or isinstance(v, float) and v.is_integer() for v in values):
        return False
    distinct = set(values)
    repeated = len(distinct) * (2 if name.lower() in LABELS else 5) <= len(values)
    return (
        2 <= len(distinct) <= CLASSES and repeated and all(len(str(v)) <= 40 and "\n" not in str(v) for v in distinct)
    )


def words_of(rows: Rows, columns: list[str], label: str) -> tuple[list[str], str]:
    """The words of the classes in the order of their ids ([] if ids don't begin at 0), and what to say of them."""
    values = set(values_of(rows, label))
    if all(isinstance(v, bool) for v in values):
        return ["false", "true"], "put what false and true mean here, in this order"
    texts = [v for v in values if isinstance(v, str)]
    if texts and not all(v.isdecimal() for v in texts):
        words = sorted(map(str, values))
        if any(word.strip().isdecimal() for word in words):
            return [], f"{len(words)} labels, as they stand"
        return words, "the labels as they stand in the file"
    ids = sorted(int(v) for v in values)
    if ids != list(range(len(ids))):
        return [], f"the numbers {ids[0]} to {ids[-1]} as they stand; for accuracy ids begin at 0, or are words"
    for name in columns:
        if words := _named_by(rows, label, name, len(ids)):
            return words, f"the words for the ids 0 to {ids[-1]}, from the column {name}"
    as_in = "[negative, positive]" if len(ids) == 2 else "[sports, politics, ...]"
    return list(map(str, ids)), f"put what the ids 0 to {ids[-1]} mean here, in this order, as in {as_in}"


def _named_by(rows: Rows, label: str, name: str, count: int) -> list[str]:
    """The words of a column in the order of the ids, if it has one for each of `count` ids; else []."""
    named = [row for row in rows if row.get(label) not in (None, "")]
    if not all(isinstance(row[label], str | int) and isinstance(row.get(name), str) for row in named):
        return []
    pairs = sorted({(int(row[label]), row[name]) for row in named})
    words = [word for _, word in pairs if word.strip() and not word.strip().isdecimal()]
    return words if len(pairs) == len(set(words)) == count else []
