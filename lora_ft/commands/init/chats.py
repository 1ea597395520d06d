"""Suggestions for chats: columns of turns, preferences, and instructions through a chat template."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_ft.commands.init.columns import SAMPLE, DataSettings, Table, base_name, is_history
from lora_ft.commands.init.names import ANSWERS, ASKS, CHATS, HELPERS, SAID_IN_TURN, SYSTEMS
from lora_ft.commands.init.rewrites import TREE, keep_true, turns_of
from lora_ft.commands.init.texts import turns_note
from lora_ft.core.errors import ConfigError
from lora_ft.data.chats.raw_turns import message_parts
from lora_ft.data.chats.turns import CALL_ROLES, KNOWN_ROLES, SYNONYMS

ONLY_CHOSEN = "preferences: only the chosen answers are learned, not that they are better than the rejected ones"


def detect_chat(table: Table) -> DataSettings | None:
    """Settings for a column of turns, or for a prompt and a completion that are turns."""
    helpers = [name for name in HELPERS if any(row.get(name) for row in table.rows)]
    prompt, completion = table.find(["prompt"], table.chats), table.find(["completion"], table.chats)
    if prompt and completion:
        settings: dict[str, Any] = {"messages": [prompt, completion]}
        note = "joined to one chat; only the assistant turns of the last are supervised"
        settings |= _roles(table, [prompt, completion])
        return DataSettings(settings, {"messages": note}, (prompt, completion, *helpers), tuple(helpers))
    if table.chats:
        column = table.find(CHATS, table.chats) or table.chats[0]
        others = [name for name in table.chats if name != column]
        notes = {"messages": f"the column with the turns; {', '.join(others)} also has some"} if others else {}
        parts: list[Any] = [column]
        system = table.find([s for s in SYSTEMS if s not in HELPERS], table.texts)
        if system and not _has_role(table, column, ("system", "developer")):
            parts, helpers = [{"system": f"[[{{{system}}}]]"}, *parts], [*helpers, system]
            notes = notes or {"messages": "the system prompt before the turns; the assistant's are supervised"}
        answer = table.find(ANSWERS, table.texts) if not _has_role(table, column, None) else None
        if answer:
            parts = [*parts, {"assistant": f"{{{answer}}}"}]
            notes = {"messages": f"the turns of {column} ask for the answer in {answer}, which is supervised"}
        settings = {"messages": parts if len(parts) > 1 else column} | _roles(table, [column])
        return DataSettings(settings, notes, (column, *filter(None, [answer]), *helpers), tuple(helpers))
    for column in table.nested_columns:
        said = [next((key for key in keys if table.all_items_have(column, key)), "") for keys in SAID_IN_TURN]
        if all(said):
            raise ConfigError(
                f"each item of `{column}` has what the user and the assistant said, in {said[0]} and {said[1]}. Make turns of "
                f"them, and run init on those: {turns_of(column, *said)}"
            )
    if table.find(["parent_id"]) and table.find(["role"]) and table.find(["text"]):
        raise ConfigError(
            "each row is one message of a tree (parent_id, role, text). Make a chat of every path from a root to a leaf, and "
            f"run init on them: {TREE}"
        )
    return None


def _said_by(table: Table, column: str) -> list[str]:
    """The roles of a column's first turns, each once, in order."""
    turns = (turn for row in table.rows[:SAMPLE] if row.get(column) for turn in message_parts(row, column)[0])
    return list(dict.fromkeys(str(turn.get("role", turn.get("from"))) for turn in turns))


def _has_role(table: Table, column: str, wanted: Sequence[str] | None) -> bool:
    """Whether some turn has one of the wanted roles; None: any that does not ask."""
    asking = ("system", "developer", "user", "human")
    return any(role in wanted if wanted else role not in asking for role in _said_by(table, column))


def _roles(table: Table, columns: list[str]) -> dict[str, Any]:
    """data.roles for roles that are not known: the user's if only the assistant's are known, else by who starts."""
    roles = dict.fromkeys(role for column in columns for role in _said_by(table, column))
    known = {role: SYNONYMS.get(role, role) for role in roles if role in (*KNOWN_ROLES, *SYNONYMS, *CALL_ROLES)}
    unknown = [role for role in roles if role not in known]
    free = [role for role in ("user", "assistant") if role not in known.values()]
    return {"roles": dict(zip(unknown, free, strict=False))} if unknown and len(unknown) <= len(free) else {}


def detect_preferences(table: Table) -> DataSettings | None:
    """Settings that learn the chosen answers alone, for rows with chosen and rejected ones.

    Raises:
        ConfigError: rows with good and bad answers, told apart by a label.
    """
    every = [*table.columns, *table.chats]
    chosen, rejected, ask = table.find(["chosen"], every), table.find(["rejected"], every), table.find(ASKS, every)
    if not chosen or not rejected:
        answer, label = table.find(["completion", "response", "answer", "output"], every), table.find(["label"])
        marks = set(table.values(label)) if label and ask and answer else set()
        if label and len(marks) > 1 and all(mark in (0, 1, "true", "false", "True", "False") for mark in marks):
            raise ConfigError(
                f"the rows are good and bad answers, told apart by `{label}` (preferences, as for KTO), and lora-ft would "
                f"learn both. Keep the rows whose {label} is true, and run init on them: {keep_true(label)}. Or learn to tell "
                "them apart: --task classification."
            )
        return None
    if chosen in table.chats:
        complete = max(len(message_parts(row, chosen)[0]) for row in table.rows[:SAMPLE] if row.get(chosen)) > 1
        first = [] if complete or not ask else [ask if ask in table.chats else {"user": f"{{{ask}}}"}]
        helpers = [name for name in HELPERS if any(row.get(name) for row in table.rows)]
        settings = {"messages": [*first, chosen] if first else chosen} | _roles(table, [chosen])
        columns = (*([ask] if first and ask else []), chosen, *helpers)
        return DataSettings(settings, {"messages": ONLY_CHOSEN}, columns, tuple(helpers))
    if ask in table.columns:
        system = [c for c in [table.find(SYSTEMS)] if c]
        prompt = "".join(f"[[{{{c}}}\n\n]]" for c in system) + f"{{{ask}}}\n"
        settings = {"prompt": prompt, "completion": f"{{{chosen}}}"}
        return DataSettings(settings, {"completion": ONLY_CHOSEN}, (*system, ask, chosen), tuple(system))
    note = "; ".join(filter(None, [ONLY_CHOSEN, turns_note(table, chosen)]))
    return DataSettings({"text": f"{{{chosen}}}"}, {"text": note}, (chosen,))


def through_chat_template(table: Table, data: DataSettings) -> DataSettings:
    """A prompt and completion as turns of a chat: for a model with a chat template."""
    *asked, answer = data.columns
    system = next((c for c in asked if base_name(c) in SYSTEMS), None)
    reasoning = data.reasoning
    asked = [c for c in asked if c != reasoning]
    asked = [c for c in asked if c != system]
    first = next((c for c in asked if base_name(c) in (*ASKS, "text", "source")), asked[0])
    rest = [c for c in asked if c != first]
    text = f"{{{first}}}" + "".join(f"[[\n\n{{{c}}}]]" if c in data.optional else f"\n\n{{{c}}}" for c in rest)
    histories = [c for c in ("history",) if all(is_history(row.get(c, [])) for row in table.rows[:SAMPLE])]
    histories = [c for c in histories if any(row.get(c) for row in table.rows)]
    said = data.settings["completion"].strip() if reasoning else f"{{{answer}}}"
    messages = [*histories, {"user": text}, {"assistant": said}]
    if system and base_name(system) != "system":  # a column of that name is read by itself
        messages = [{"system": f"[[{{{system}}}]]" if table.has_gaps(system) else f"{{{system}}}"}, *messages]
    helpers = [c for c in HELPERS if any(row.get(c) for row in table.rows)]
    settings = {name: value for name, value in data.settings.items() if name not in ("prompt", "completion")}
    note = data.notes.get("completion", "") or "through the model's chat template; only the last part is supervised"
    if gaps := [c for c in data.optional if base_name(c) != "system"]:
        note += f"; [[...]] is left out where {', '.join(gaps)} is empty"
    optional = (*(c for c in data.optional if c != system), *filter(None, [system]), *helpers, *histories)
    columns = (*data.columns, *helpers, *histories)
    return replace(
        data, settings={"messages": messages} | settings, notes={"messages": note}, columns=columns, optional=optional
    )
