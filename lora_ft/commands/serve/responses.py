"""Answers on their way to the client, whole or as server-sent events, and a client that goes away."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lora_ft.commands.serve.answers import Answers
from lora_ft.commands.serve.bodies import ApiError, Sampling
from lora_ft.commands.serve.guard import ascii_json
from lora_ft.commands.serve.jobs import Event, Failed, Finished, Job, Piece, PromptScores


class Asked(NamedTuple):
    """A request's jobs, the form of its answers, and where its events arrive: (number of the job, event)."""

    jobs: list[Job]
    answers: Answers
    events: "asyncio.Queue[tuple[int, Event]]"
    echo: list[str]  # texts of the prompts that begin the answers


async def respond(request: Request, body: Sampling, asked: Asked) -> Response:
    """The answers, whole or streamed; a client that goes away ends its jobs."""
    pieces = _pieces(asked)
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_chunks(pieces, asked, usage), partial(_abandon, asked.jobs))

    async def collect() -> None:
        async for piece in pieces:
            asked.answers.add(piece)

    collecting, gone = asyncio.create_task(collect()), asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        collecting.result()
        return ascii_json(asked.answers.whole())
    finally:
        gone.cancel()
        collecting.cancel()
        _abandon(asked.jobs)


async def _pieces(asked: Asked) -> AsyncIterator[Piece]:
    """The pieces of all choices, numbered through, echoed prompts first; ApiError if a job fails."""
    left, n = len(asked.jobs), asked.jobs[0].n
    for number, text in enumerate(asked.echo if not asked.jobs[0].score_prompt else []):
        for choice in range(n):
            yield Piece(number * n + choice, text, [], None, 0)
    while left:
        number, event = await asked.events.get()
        match event:
            case Piece():
                yield event._replace(number=number * n + event.number)
            case PromptScores():
                for choice in range(n):
                    yield Piece(number * n + choice, asked.echo[number], event.scores, None, 0)
            case Failed():
                raise ApiError(event.status, event.message)
            case Finished():
                left -= 1


async def _chunks(pieces: AsyncIterator[Piece], asked: Asked, usage: bool) -> AsyncIterator[str]:
    answers = asked.answers
    for chunk in answers.first_chunks(sum(job.n for job in asked.jobs)):
        yield json.dumps(chunk)
    try:
        async for piece in pieces:
            for chunk in answers.chunks(piece):
                yield json.dumps(chunk)
    except ApiError as e:
        yield json.dumps(e.body())
        return
    if usage:
        yield json.dumps(answers.usage_chunk())
    yield "[DONE]"


def later(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, event: tuple[int, Event]) -> None:
    """Hand an event to the server's loop, from the engine's thread; where that has ended, nobody waits for it."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


def _abandon(jobs: list[Job]) -> None:
    """Nobody waits for them any more; those that are complete have left the engine."""
    for job in jobs:
        job.gone = True


class EventStream(Response):
    """A response of server-sent events. ended: called when all are sent, or the client has gone."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], object]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.raw_headers[[name for name, _ in self.raw_headers].index(b"content-length")]
        self.events, self.ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self.events:
                body = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        sending, gone = asyncio.create_task(send_all()), asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not isinstance(sending.exception(), OSError | None):  # OSError: the client has gone
                sending.result()
        finally:
            sending.cancel()
            gone.cancel()
            self.ended()


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
