"""The words of a classification's labels."""

from lora_ft.commands.init.columns import Table

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def class_words(table: Table, label: str) -> tuple[list[str], str, str]:
    """The words of the classes by id, a note on them, and the column that they come from ("" if from no other).

    The words are [] if the values cannot be ids or words of `label_names`. Ids without words get letters: unlike digits,
    they do not share a first token.
    """
    values = set(table.values(label))
    if known := table.class_names.get(label):
        return list(known), "the names of the classes in the file", ""
    if all(isinstance(v, bool) for v in values):
        return ["false", "true"], "replace by what false and true mean, in this order", ""
    if any(isinstance(v, str) and not v.isdecimal() for v in values):
        words = sorted(map(str, values))
        if any(word.strip().isdecimal() for word in words):
            return [], f"{len(words)} labels, as in the file", ""
        return words, "the labels in the file", ""
    ids = sorted(int(v) for v in values)
    if ids[0] == -1 and len(ids) > 2:
        ids = ids[1:]  # a row without a label, as in GLUE and SNLI
    if ids != list(range(len(ids))):
        return [], f"the numbers {ids[0]} to {ids[-1]} in the file; to measure accuracy use words, or ids from 0", ""
    for name in table.columns:
        if words := _words_by_id(table, label, name, len(ids)):
            return words, f"the words for the ids 0 to {ids[-1]}, from the column {name}", name
    if len(ids) > len(LETTERS):
        return [], f"the ids 0 to {ids[-1]}; to measure accuracy name them in label_names: {{{label}: [...]}}", ""
    example = "[negative, positive]" if len(ids) == 2 else "[sports, politics, ...]"
    return list(LETTERS[: len(ids)]), f"replace by what the ids 0 to {ids[-1]} mean, in this order, as in {example}", ""


def _words_by_id(table: Table, label: str, name: str, count: int) -> list[str]:
    """The words of column `name` in the order of the ids, if it has exactly one for each of `count` ids; else []."""
    labelled = [row for row in table.rows if row.get(label) not in (None, "")]
    if not all(isinstance(row[label], str | int) and isinstance(row.get(name), str) for row in labelled):
        return []
    pairs = sorted({(int(row[label]), row[name]) for row in labelled})
    words = [word for _, word in pairs if word.strip() and not word.strip().isdecimal()]
    return words if len(pairs) == len(set(words)) == count else []
