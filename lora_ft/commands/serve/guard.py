"""What stands before every route: who may ask, how much, and errors in OpenAI's form."""

import asyncio
import hmac
import json
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_ft.commands.serve.bodies import ApiError
from lora_ft.commands.serve.metrics import Metrics
from lora_ft.core.messages import info

OPEN = ("/", "/health")  # without a key: they tell nothing
BODY_SECONDS = 30  # in which a body must have arrived


def ascii_json(value: Any, status: int = 200) -> Response:
    """JSON in ASCII, which any text survives."""
    return Response(json.dumps(value), status, media_type="application/json")


class Guard:
    """An application that asks for a key and the right Host, counts, and turns every error into JSON.

    hosts: without a key a server on this machine is there for this machine's programs, not for web pages in its browser: their
    requests name another host (DNS rebinding), or are no JSON.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], hosts: tuple[str, ...] | None, metrics: Metrics):
        self.app, self.keys, self.hosts, self.metrics = app, [key.encode() for key in keys], hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["app"], started = self, False  # so that the router raises its errors

        async def noted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.metrics.requests[scope.get("lora_ft_model", ""), message["status"]] += 1
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
            await self.app(scope, receive, noted)
            return
        except ClientDisconnect:
            return
        except ApiError as e:
            error = e
        except HTTPException as e:
            said = {404: "there is no such path", 405: "this path takes another method"}
            error = ApiError(e.status_code, said.get(e.status_code, e.detail))
        except Exception as e:  # noqa: BLE001 (told without its text, which may quote a prompt)
            info(f"{scope['method']}: {type(e).__name__}")
            error = ApiError(500, "internal error")
        if not started:
            await _response(error)(scope, receive, noted)

    def _check(self, path: str, headers: Headers) -> None:
        host = re.match(r"\[[^\]]*\]|[^:]*", headers.get("host", ""))
        if self.hosts is not None and (not host or host[0].lower() not in self.hosts):
            raise ApiError(403, "this server answers to its own name only", None, "host_not_allowed")
        if not self.keys or path in OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "replace") if kind.lower() == "bearer" else b""
        if not sum(
            hmac.compare_digest(given, own) for own in self.keys
        ):  # all are compared: no key is told by the time
            raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", None, "invalid_api_key")


def _response(error: ApiError) -> Response:
    response = ascii_json(error.body(), error.status)
    more = {401: ("www-authenticate", "Bearer"), 429: ("retry-after", "1")}.get(error.status)
    if more:
        response.headers[more[0]] = more[1]
    return response


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request: 413 if it has more than `most` bytes, 408 if it does not arrive, 415 if it is not JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json")
    too_large = ApiError(413, f"the body is larger than {most:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > most:
                raise too_large

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time") from None
    return bytes(body)
