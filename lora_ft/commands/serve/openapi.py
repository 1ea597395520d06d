"""The routes as an OpenAPI document, for clients, test tools and people."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lora_ft.commands.serve.bodies import ChatBody, CompletionBody, LoadBody, Sampling, UnloadBody
from lora_ft.core.version import __version__

GETS = {
    "/health": "200 while the engine lives",
    "/metrics": "counts in Prometheus' form",
    "/v1/models": "the base and the adapters",
}
POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatBody, "an answer to messages"),
    "/v1/completions": (CompletionBody, "a continuation of a text or of token ids"),
}
ADAPTERS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/load_lora_adapter": (LoadBody, "load an adapter from below the server's folder of adapters"),
    "/v1/unload_lora_adapter": (UnloadBody, "forget an adapter"),
}
ERRORS = (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)


def document(models: Sequence[str], *, adapters: bool, keys: bool) -> dict[str, Any]:
    """models: those that are served. adapters: whether requests may load adapters. keys: whether a request needs one."""
    names = {"type": "string", "enum": [*models]}
    posts = POSTS | (ADAPTERS if adapters else {})
    refs, schemas = models_json_schema(
        [(body, "validation") for body, _ in posts.values()], ref_template="#/components/schemas/{model}"
    )
    for body, _ in posts.values():
        if issubclass(body, Sampling):  # these are taken out before the model sees them
            known = schemas["$defs"][body.__name__]["properties"]
            known |= {name: {"enum": [None, *values]} for name, values in body.NEUTRAL.items()}
            known |= {name: {} for name in body.IGNORED} | {"model": names}
    paths: dict[str, Any] = {path: {"get": _operation(summary)} for path, summary in GETS.items()}
    parameter = {"name": "name", "in": "path", "required": True, "schema": names}
    paths["/v1/models/{name}"] = {"get": _operation("one of the models") | {"parameters": [parameter]}}
    for path, (body, summary) in posts.items():
        content = {"application/json": {"schema": refs[body, "validation"]}}
        paths[path] = {"post": _operation(summary) | {"requestBody": {"required": True, "content": content}}}
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lora-ft serve", "version": __version__},
        "paths": paths,
        "components": components,
        **({"security": [{"key": []}]} if keys else {}),
    }


def _operation(summary: str) -> dict[str, Any]:
    failed = {str(status): {"description": "OpenAI's form of an error"} for status in ERRORS}
    return {"summary": summary, "responses": {"200": {"description": summary}} | failed}
