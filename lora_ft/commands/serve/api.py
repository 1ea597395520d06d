"""The routes: a body in, jobs to the engine, OpenAI's JSON out."""

import asyncio
import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router

from lora_ft.commands.generate.serving import BASE, Served, override
from lora_ft.commands.serve.adapters import load_lora_adapter, unload_lora_adapter
from lora_ft.commands.serve.answers import Answers
from lora_ft.commands.serve.bodies import ApiError, ChatBody, CompletionBody, LoadBody, Sampling, UnloadBody, parse
from lora_ft.commands.serve.engine import Engine
from lora_ft.commands.serve.guard import Guard, ascii_json, read_body
from lora_ft.commands.serve.jobs import Event, Full, Job
from lora_ft.commands.serve.openapi import document
from lora_ft.commands.serve.page import page
from lora_ft.commands.serve.prompts import chat_ids, completion_ids
from lora_ft.commands.serve.responses import Asked, later, respond
from lora_ft.core.messages import printable
from lora_ft.model.generate import position_limit, to_text

MIN_TEMPERATURE = 0.001  # below it logits overflow


class Settings(NamedTuple):
    """base: the base's name for requests. keys: of which one is needed. adapters: the folder that adapters may be loaded from.

    hosts: names that the Host header may have; None for any. seconds: of a request. body: bytes of one.
    """

    base: str
    keys: tuple[str, ...] = ()
    adapters: Path | None = None
    hosts: tuple[str, ...] | None = None
    seconds: float = 600
    body: int = 4 * 2**20


class Api:
    """The server's routes over an engine."""

    def __init__(self, served: Served, engine: Engine, settings: Settings):
        self.served, self.engine, self.settings = served, engine, settings
        self.created = int(time.time())
        # a tokenizer is for one thread; which reads adapters too, and leaves OpenMP's threads to the engine, see `started`
        self._encoding = ThreadPoolExecutor(1, "prompts", initializer=torch.set_num_threads, initargs=(1,))
        routes = [
            Route("/", self.page),
            Route("/openapi.json", self.openapi),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        if settings.adapters:
            routes.append(Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]))
            routes.append(Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]))
        self.app = Guard(Router(routes), settings.keys, settings.hosts, engine.metrics)

    async def page(self, request: Request) -> Response:
        """A page for a browser."""
        return page()

    async def openapi(self, request: Request) -> Response:
        """The routes as an OpenAPI document."""
        may = {"adapters": bool(self.settings.adapters), "keys": bool(self.settings.keys)}
        return ascii_json(document(self._names(), **may))

    async def health(self, request: Request) -> Response:
        """200 while the engine's thread lives."""
        return JSONResponse({"status": "ok"}) if self.engine.alive else JSONResponse({"status": "failed"}, 503)

    async def metrics(self, request: Request) -> Response:
        """Counts for Prometheus."""
        return PlainTextResponse(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The base and the adapters."""
        return ascii_json({"object": "list", "data": [self._model(name) for name in self._names()]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        self._adapter(name)
        return ascii_json(self._model(name))

    def _names(self) -> list[str]:
        return [self.settings.base, *self.served.names]

    def _model(self, name: str) -> dict[str, Any]:
        adapter = self._adapter(name)
        parent = None if adapter is None else self.settings.base
        known: dict[str, Any] = {"id": name, "object": "model", "created": self.created, "owned_by": "lora-ft"}
        is_chat = self.served.formats[adapter].is_chat
        return known | {"parent": parent, "is_chat": is_chat, "max_model_len": position_limit(self.served.model)}

    def _adapter(self, name: str) -> str | None:
        if name in self.served.names:
            return name
        if name in (self.settings.base, BASE):
            return None
        known = ", ".join(self._names())
        raise ApiError(404, f"no model {printable(name, 100)}; there are {known}", "model", "model_not_found")

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        body = parse(ChatBody, await read_body(request, self.settings.body))
        adapter = self._adapter(body.model)
        request.scope["lora_ft_model"] = body.model
        if body.max_completion_tokens is not None:
            body.max_tokens = body.max_completion_tokens
        if body.max_tokens == 0:
            raise ApiError(400, "max_tokens: must be at least 1", "max_tokens")
        ids = await self._encoded(partial(chat_ids, self.served.formats[adapter], body))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        asked = self._ask(body, adapter, [ids], logprobs, chat=True)
        asked.answers.calls_tools = bool(body.tools)
        return await respond(request, body, asked)

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions; with echo and logprobs the scores of the prompt too."""
        body = parse(CompletionBody, await read_body(request, self.settings.body))
        adapter = self._adapter(body.model)
        request.scope["lora_ft_model"] = body.model
        if body.best_of not in (None, body.n or 1):
            raise ApiError(400, "best_of: is not supported; ask for n", "best_of", "unsupported_parameter")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens: must be at least 1, but for echo", "max_tokens")
        vocabulary = self.served.model.get_input_embeddings().num_embeddings
        prompts = await self._encoded(partial(completion_ids, self.served.formats[adapter], body, vocabulary))
        if body.echo and body.logprobs is not None and self.served.prefix(adapter):
            raise ApiError(400, "echo: a tuned prompt has no scores of its prompt", "echo", "unsupported_parameter")
        asked = self._ask(body, adapter, prompts, body.logprobs, chat=False, echo=bool(body.echo))
        return await respond(request, body, asked)

    async def load_adapter(self, request: Request) -> Response:
        """vLLM's route: load an adapter from below the folder that was named at the start."""
        body = parse(LoadBody, await read_body(request, self.settings.body))
        assert self.settings.adapters is not None
        taken = {self.settings.base, BASE}
        await load_lora_adapter(self.served, self.engine, self.settings.adapters, body, taken, self._encoding)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        """vLLM's route: forget an adapter that no request uses."""
        body = parse(UnloadBody, await read_body(request, self.settings.body))
        await unload_lora_adapter(self.served, self.engine, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _encoded(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function)

    def _ask(
        self,
        body: Sampling,
        adapter: str | None,
        prompts: list[list[int]],
        logprobs: int | None,
        *,
        chat: bool,
        echo: bool = False,
    ) -> Asked:
        """Submit one job for each prompt; ApiError if one is too long or the queue is full."""
        served, loop = self.served, asyncio.get_running_loop()
        self._adapter(body.model)  # it may have been unloaded since
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        template = served.formats[adapter].written_markers if chat else ""

        def teller(number: int) -> Callable[[Event], None]:
            return lambda event: later(loop, events, (number, event))

        jobs = []
        for number, prompt in enumerate(prompts):
            ids = [*served.prefix(adapter), *prompt]
            job = Job(
                adapter=adapter,
                ids=ids,
                config=self._config(body, len(ids)),
                ends=served.ends_of(adapter),
                text_of=lambda new: to_text(served.tokenizer, new, template),
                tell=teller(number),
                stop=body.stop or [],  # type: ignore[arg-type]  # a list after validation
                n=body.n or 1,
                seed=body.seed,
                logprobs=logprobs,
                score_prompt=echo and logprobs is not None,
                streamed=bool(body.stream),
                deadline=time.monotonic() + self.settings.seconds,
            )
            if problem := self.engine.refusal(job):
                raise ApiError(400, problem, "max_tokens", "context_length_exceeded")
            jobs.append(job)
        answers = Answers(body.model, chat, sum(map(len, prompts)), self._token_text)
        try:
            self.engine.submit(jobs)
        except Full:
            raise ApiError(429, "the queue is full: try again later", None, "queue_full") from None
        return Asked(jobs, answers, events, [self._whole_text(ids) for ids in prompts] if echo else [])

    def _config(self, body: Sampling, length: int) -> Any:
        """How to sample; ApiError if prompt and answer don't fit into the model's positions."""
        config, positions = copy.deepcopy(self.served.sampling), position_limit(self.served.model)
        most = body.max_tokens
        if positions and length + (1 if most is None else most) > positions:
            new = "" if most is None else f" and {most} new ones"
            problem = f"the prompt's {length} tokens{new} exceed the model's {positions} positions"
            raise ApiError(400, problem, "messages", "context_length_exceeded")
        if most is None and positions:
            most = min(config.max_new_tokens, positions - length)
        greedy = body.temperature == 0
        temperature = None if body.temperature is None else max(body.temperature, MIN_TEMPERATURE)
        given = {} if greedy else {"temperature": temperature, "top_p": body.top_p, "top_k": body.top_k}
        override(config, greedy, most, **given)
        return config

    def _token_text(self, token: int) -> str:
        return self._whole_text([token])

    def _whole_text(self, ids: list[int]) -> str:
        return self.served.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
