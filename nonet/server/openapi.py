"""/openapi.json, from the wire schema itself: requests by pydantic, responses by msgspec.

Used by `app`. One table of routes; a field that is missing here is missing in the schema of the bodies.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from nonet.openai import requests, responses
from nonet.openai.fields import Body

_REF = "#/components/schemas/{name}"
_BODIES: dict[str, tuple[type[Body], str]] = {
    "/v1/completions": (requests.CompletionRequest, "Continue a text or token ids"),
    "/v1/chat/completions": (requests.ChatCompletionRequest, "Continue a chat"),
    "/tokenize": (requests.TokenizeRequest, "Token ids of a prompt or a chat"),
    "/detokenize": (requests.DetokenizeRequest, "Text of token ids"),
}
_ANSWERS: dict[str, tuple[type[msgspec.Struct], type[msgspec.Struct] | None]] = {  # whole, and a chunk of a stream
    "/v1/completions": (responses.Completion, responses.Completion),
    "/v1/chat/completions": (responses.ChatCompletion, responses.ChatChunk),
    "/tokenize": (responses.Tokenized, None),
    "/detokenize": (responses.Detokenized, None),
    "/v1/models": (responses.ModelList, None),
    "/v1/models/{model}": (responses.ModelCard, None),
    "/health": (responses.Health, None),
    "/version": (responses.Version, None),
}
_GETS = {
    "/v1/models": "The names under which the model is served",
    "/v1/models/{model}": "One of them",
    "/health": "Whether the engine lives",
    "/version": "The version of nonet",
    "/metrics": "Counters in Prometheus's text form",
}
_WORDS = {
    400: "A field is wrong: the message names it, its value and the remedy.",
    401: "No valid API key.",
    404: "The model is not served here.",
    413: "The body is larger than max_request_bytes.",
    415: "The body is not said to be JSON.",
    503: "The engine is dead, or has no room.",
}
_RANK = {
    "name": "X-data-parallel-rank", "in": "header", "required": False, "schema": {"type": "integer", "minimum": 0},
    "description": "The data-parallel rank that shall serve the request.",
}  # fmt: skip
_ID = {
    "name": "X-Request-Id", "in": "header", "required": False,
    "schema": {"type": "string", "pattern": "^[!-~]{1,256}$"}, "description": "Comes back, and is part of ids.",
}  # fmt: skip


def document(version: str, names: list[str], secured: bool) -> dict[str, Any]:
    """The OpenAPI document of a server that knows the model under these names."""
    paths: dict[str, Any] = {}
    for path, (_, summary) in _BODIES.items():
        paths[path] = {"post": _operation(path, summary, secured)}
    for path, summary in _GETS.items():
        paths[path] = {"get": _operation(path, summary, secured)}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "nonet", "version": version},
        "paths": paths,
        "components": {"schemas": _schemas(names)},
    }
    if secured:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _operation(path: str, summary: str, secured: bool) -> dict[str, Any]:
    posts, guarded = path in _BODIES, secured and path.startswith("/v1")
    statuses = [400, *([404, 413, 415] if posts else [404] if "{" in path else []), 503, *([401] if guarded else [])]
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", "").removeprefix("v1_"),
        "parameters": [_ID],
        "responses": {"200": _answer(path), **{str(status): _error(status) for status in sorted(statuses)}},
    }
    if "{" in path:
        operation["parameters"] = [_ID, {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if path.endswith("completions"):
        operation["parameters"] = [_ID, _RANK]
    if posts:
        schema = {"$ref": _REF.format(name=_BODIES[path][0].__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if guarded:
        operation["security"] = [{"key": []}]
    return operation


def _answer(path: str) -> dict[str, Any]:
    if path not in _ANSWERS:
        return {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    whole, chunk = _ANSWERS[path]
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF.format(name=whole.__name__)}}}
    text = "OK"
    if chunk is not None:
        text = f"Whole, or with stream a {chunk.__name__} in each event; the last event is [DONE]."
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": text, "content": content}


def _error(status: int) -> dict[str, Any]:
    schema = {"$ref": _REF.format(name="Error")}
    return {"description": _WORDS[status], "content": {"application/json": {"schema": schema}}}


def _schemas(names: list[str]) -> dict[str, Any]:
    bodies = [(kind, "validation") for kind, _ in _BODIES.values()]
    _, taken = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    kinds: set[type[msgspec.Struct]] = {responses.Error}
    kinds.update(kind for pair in _ANSWERS.values() for kind in pair if kind is not None)
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, given = msgspec.json.schema_components(ordered, ref_template=_REF)
    for kind, _ in _BODIES.values():
        taken["$defs"][kind.__name__]["properties"]["model"]["enum"] = [*names, None]
    return {**given, **taken["$defs"]}
