"""The bodies of requests, in OpenAI's form (https://platform.openai.com/docs/api-reference), and errors in OpenAI's form.

A parameter that would change the answer and is not supported is refused, never ignored.
"""

import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lora_ft.core.messages import printable

Text = Annotated[str, Field(max_length=1_000_000)]


class ApiError(Exception):
    """An answer other than 200. param: the field of the body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Sampling(BaseModel):
    """What both routes take. What is not given is as in the model's generation config.

    NEUTRAL: parameters of OpenAI's that are not supported, with the values that change nothing.
    IGNORED: parameters that concern an account, not the answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "suffix": ("",),
        "tool_choice": ("auto", "none"),
        "parallel_tool_calls": (True,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
    }
    IGNORED: ClassVar[tuple[str, ...]] = (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    )  # fmt: skip
    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    stop: Text | list[Text] | None = Field(None)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    columns: dict[str, Text] | None = None

    @field_validator("stop", mode="after")
    @classmethod
    def _few(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or any(not stop or len(stop) > 1000 for stop in stops):
            raise ValueError("at most 16 texts, none empty or longer than 1,000 characters")
        return stops


class ChatBody(Sampling):
    messages: list[Any]
    tools: list[Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionBody(Sampling):
    prompt: Text | list[Text] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None


class LoadBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,100}$")
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadBody(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    lora_name: str


B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], raw: bytes) -> B:
    """The body of a request; ApiError 400, which names the field, if it is malformed."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not valid JSON: {printable(str(e), 100)}") from e
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    if issubclass(kind, Sampling):
        value = {key: v for key, v in value.items() if key not in kind.IGNORED}
        for name, neutral in kind.NEUTRAL.items():
            if name in value and (given := value.pop(name)) is not None and given not in neutral:
                allowed = " or ".join(json.dumps(v) for v in neutral)
                said = f"only {allowed}" if allowed else "it can't be given"
                raise ApiError(400, f"{name} is not supported: {said}", name, "unsupported_parameter")
    try:
        return kind.model_validate(value)
    except (ValidationError, RecursionError) as e:
        first = e.errors(include_url=False, include_input=False)[0] if isinstance(e, ValidationError) else None
        where = printable(".".join(map(str, first["loc"])), 100) if first else None
        problem = first["msg"] if first else "nested too deeply"
        raise ApiError(400, f"{where}: {problem}" if where else problem, where) from e
