"""OpenAI's JSON of answers, whole and in chunks."""

import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_ft.commands.serve.jobs import Piece, TokenScore, begun

TOOL_CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>\s*", re.DOTALL)
OPENING = "<tool_call>"  # of Hermes, Qwen, SmolLM3 and others


@dataclass
class Answers:
    """The answers to one request, built from the pieces that the engine tells.

    chat: in the form of chats. tokens: a token's text. calls_tools: <tool_call> in an answer begins a tool call.
    """

    model: str
    chat: bool
    prompt_tokens: int
    token_text: Callable[[int], str]
    calls_tools: bool = False
    texts: dict[int, str] = field(default_factory=dict)  # by choice
    scores: dict[int, list[TokenScore]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    told: dict[int, int] = field(default_factory=dict)  # characters that chunks have told

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def add(self, piece: Piece) -> None:
        """Take a piece."""
        i = piece.number
        self.texts[i] = self.texts.get(i, "") + piece.text
        self.scores.setdefault(i, []).extend(piece.scores)
        self.tokens[i] = piece.tokens
        if piece.finish:
            self.finish[i] = piece.finish

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the answers."""
        generated = sum(self.tokens.values())
        total = self.prompt_tokens + generated
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed; all choices are complete."""
        choices = []
        for i in sorted(self.texts):
            scores = self._scores(self.scores[i])
            if self.chat:
                text, calls = self._calls(i)
                message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
                message |= {"tool_calls": calls} if calls else {}
                choices.append(
                    {"index": i, "message": message, "logprobs": scores, "finish_reason": self._finish(i, calls)}
                )
            else:
                choices.append({"index": i, "text": self.texts[i], "logprobs": scores, "finish_reason": self.finish[i]})
        return self._response("chat.completion" if self.chat else "text_completion", choices) | {"usage": self.usage()}

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """What a stream begins with: in chats the role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(i, delta, None, None) for i in range(choices)] if self.chat else []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece and return what a stream tells of it. The text from a tool call on is told at the end."""
        self.add(piece)
        i = piece.number
        calls: list[dict] = []
        text, told = self.texts[i], self.told.get(i, 0)
        if self.calls_tools and not piece.finish:
            held = text.find(OPENING)
            text = text[:held] if held >= 0 else text[: len(text) - begun(text, OPENING)]
        elif self.calls_tools:
            text, calls = self._calls(i)
        new, self.told[i] = text[told:], max(told, len(text))
        scores = self._scores(piece.scores) if piece.scores else None
        found = []
        if self.chat:
            if calls:
                indexed = [{"index": n} | call for n, call in enumerate(calls)]
                found.append(self._chunk(i, {"tool_calls": indexed}, None, None))
            if new or scores:
                found.insert(0, self._chunk(i, {"content": new}, scores, None))
            if piece.finish:
                found.append(self._chunk(i, {}, None, self._finish(i, calls)))
        elif new or scores or piece.finish:
            choice = {"index": i, "text": new, "logprobs": scores, "finish_reason": piece.finish}
            found.append(self._response("text_completion", [choice]))
        return found

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream with stream_options.include_usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._response(kind, []) | {"usage": self.usage()}

    def _chunk(self, index: int, delta: dict, scores: dict | None, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        return self._response("chat.completion.chunk", [choice])

    def _response(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _finish(self, index: int, calls: list[dict]) -> str:
        return "tool_calls" if calls else self.finish[index]

    def _calls(self, index: int) -> tuple[str, list[dict]]:
        """The text of a chat's answer and its tool calls; text that only looks like a call stays text."""
        text = self.texts[index]
        if not self.calls_tools:
            return text, []
        calls = []
        for match in TOOL_CALL.finditer(text):
            try:
                call = json.loads(match[1])
            except (ValueError, RecursionError):
                return text, []
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return text, []
            arguments = call.get("arguments", call.get("parameters", {}))
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
            function = {"name": call["name"], "arguments": arguments}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return (text[: text.find(OPENING)].rstrip() if calls else text), calls

    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores:
            return None
        texts = [self.token_text(score.token) for score in scores]
        if self.chat:
            content = []
            for text, score in zip(texts, scores, strict=True):
                likely = [_with_bytes(self.token_text(token), logprob) for token, logprob in score.top]
                content.append(_with_bytes(text, score.logprob) | {"top_logprobs": likely})
            return {"content": content, "refusal": None}
        offsets, place = [], 0
        for text in texts:
            offsets.append(place)
            place += len(text)
        tops = []
        for text, score in zip(texts, scores, strict=True):
            top: dict[str, float] = {}
            for token, logprob in score.top:
                top.setdefault(self.token_text(token), logprob)  # the likeliest of those that look alike
            if score.logprob is not None:
                top.setdefault(text, score.logprob)
            tops.append(top if score.logprob is not None else None)
        logprobs = [score.logprob for score in scores]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _with_bytes(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
