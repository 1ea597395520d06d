"""The prompts of requests as token ids, through the template of the adapter's run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_ft.commands.generate.prompts import USER, PromptFormat
from lora_ft.commands.serve.bodies import ApiError, ChatBody, CompletionBody
from lora_ft.data.chats.turns import read_prompt
from lora_ft.data.template import BadRow


def chat_ids(form: PromptFormat, body: ChatBody) -> list[int]:
    """The prompt of a chat: through the chat template, or the one user's message through the run's template of a prompt."""
    try:
        columns: dict[str, Any] = {"messages": body.messages, "tools": body.tools}
        turns, tools = read_prompt(columns, "messages", form.template.roles)
        if len(turns) < len(body.messages) or not turns:
            raise BadRow("the last message must not be the assistant's")
        if form.is_chat:
            if body.columns:
                raise BadRow("columns are for a run with a template of a prompt, and this model takes a chat")
            return some(form.from_turns(turns, tools)[1])
        if len(turns) > 1 or turns[0]["role"] != USER or tools:
            raise BadRow("this model was not trained on chats: send one message of the user, without tools")
        return _filled(form, turns[0]["content"], body.columns)
    except (BadRow, RecursionError) as e:
        raise ApiError(400, f"messages: {e or 'nested too deeply'}", "messages") from e


def completion_ids(form: PromptFormat, body: CompletionBody, vocabulary: int) -> list[list[int]]:
    """The prompts of a completion: token ids as they are; a text through the run's template of a prompt, else as it is."""
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    several: Sequence[Any] = [given] if given and isinstance(given[0], int) else given
    if not several or not all(several):
        raise ApiError(400, "prompt: is empty", "prompt")
    if len(several) > 128:
        raise ApiError(400, "prompt: at most 128 prompts in a request", "prompt")
    prompts = []
    for prompt in several:
        if not isinstance(prompt, str):
            if not all(0 <= i < vocabulary for i in prompt):
                raise ApiError(400, f"prompt: token ids are from 0 to {vocabulary - 1}", "prompt")
            prompts.append(prompt)
            continue
        try:
            prompts.append(_filled(replace(form, is_chat=False), prompt, body.columns))
        except BadRow as e:
            raise ApiError(400, f"prompt: {e}", "prompt") from e
    return prompts


def _filled(form: PromptFormat, text: str, columns: dict[str, str] | None) -> list[int]:
    given = columns or {}
    unknown = [name for name in given if name not in form.columns]
    if unknown:
        has = (
            f"the run's template has {', '.join(form.columns)}"
            if form.columns
            else "this model has no template of a prompt"
        )
        raise BadRow(f"there is no such column in columns: {has}")
    if form.template.prompt is not None and len(open_columns := form.open_columns(given)) > 1:
        raise BadRow(f"the run's template takes {', '.join(open_columns)}: give all but one in columns")
    return some(form.from_text(text, given=given)[1])


def some(ids: list[int]) -> list[int]:
    """The ids, of which there must be one."""
    if not ids:
        raise BadRow("the prompt is empty")
    return ids
