"""Suggestions for plain texts."""

import re

from lora_ft.commands.init import names
from lora_ft.commands.init.columns import DataSettings, Table

TURNS_IN_TEXT = re.compile(
    r"(human|user)\s*:.*(assistant|bot|gpt)\s*:|<\|im_start\|>|\[INST\]", re.DOTALL | re.IGNORECASE
)


def detect_text(table: Table) -> DataSettings | None:
    """Settings that learn all of a text, after the system prompt that is beside it."""
    if not (texts := [c for c in table.long_texts if not c.endswith("[0]")]):
        return None
    text, system = table.find(names.TEXTS, texts) or texts[0], table.find(names.SYSTEMS, table.texts)
    note = turns_note(table, text)
    notes = {"text": note} if note else {}
    if system and system != text:
        return DataSettings({"text": f"[[{{{system}}}\n\n]]{{{text}}}"}, notes, (system, text), (system,))
    return DataSettings({"text": f"{{{text}}}"}, notes, (text,))


def turns_note(table: Table, text: str) -> str:
    """A note on a text that contains turns; "" for another one."""
    values = table.values(text)
    if 2 * sum(bool(TURNS_IN_TEXT.search(value)) for value in values) <= len(values):
        return ""
    return "the turns in it are all learned, the user's too; to learn the answers alone make data.messages of them"
