"""Commands that rewrite JSON Lines which no task can use as they are, for the errors of `init`."""

REWRITE = "python -c 'import json, sys; {}' < OLD.jsonl > NEW.jsonl"

TREE = REWRITE.format(
    'rows = {r["message_id"]: r for r in map(json.loads, sys.stdin)}; '
    'path = lambda i: [*path(rows[i]["parent_id"]), rows[i]] if i in rows else []; '
    'inner = {r["parent_id"] for r in rows.values()}; '
    '[print(json.dumps({"messages": [{"role": r["role"], "content": r["text"]} for r in path(i)]})) '
    "for i in rows if i not in inner and len(path(i)) > 1]"
)
# A list of plain values becomes its items with spaces between them, any other list or object its JSON text
AS_TEXT = REWRITE.format(
    "flat = lambda v: isinstance(v, list) and not any(isinstance(i, (list, dict)) for i in v); "
    'text = lambda v: " ".join(map(str, v)) if flat(v) else json.dumps(v, ensure_ascii=False) '
    "if isinstance(v, (list, dict)) else v; "
    "[print(json.dumps({k: text(v) for k, v in json.loads(line).items()}, ensure_ascii=False)) for line in sys.stdin]"
)


def keep_true(column: str) -> str:
    """The command that keeps the rows in which a column is true."""
    return REWRITE.format(f'sys.stdout.writelines(line for line in sys.stdin if json.loads(line)["{column}"])')


def turns_of(column: str, user: str, assistant: str) -> str:
    """The command that makes `messages` of a column of objects with what the user and the assistant said."""
    return REWRITE.format(
        f'chat = lambda row: [{{"role": role, "content": turn[key]}} for turn in row["{column}"] '
        f'for role, key in (("user", "{user}"), ("assistant", "{assistant}")) if turn.get(key)]; '
        '[print(json.dumps({"messages": chat(json.loads(line))}, ensure_ascii=False)) for line in sys.stdin]'
    )
