"""Requests to an application in this process, without a socket."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Answered(NamedTuple):
    """An answer. chunks: its body as it came."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The server-sent events but the last, which is [DONE]."""
        *events, done = self.body.decode().removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]", done
        return [json.loads(event.removeprefix("data: ")) for event in events]


async def ask(
    app: Callable,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    gone_after: int | None = None,
    method: str | None = None,
) -> Answered:
    """The answer to a GET, or to a POST of a body: bytes, or what JSON says. gone_after: chunks until the client goes away."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"host": "127.0.0.1:8000", "content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 5000),
    }
    gone, started, chunks, told = asyncio.Event(), {}, [], iter([{"type": "http.request", "body": raw}])
    if gone_after == 0:
        gone.set()

    async def receive() -> dict:
        if (message := next(told, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            assert not started, "two answers"
            started.update(message)
        elif message.get("body"):
            chunks.append(message["body"])
            if gone_after is not None and len(chunks) >= gone_after:
                gone.set()

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in started.get("headers", [])}
    return Answered(started.get("status", 0), headers, chunks)
