"""/openapi.json: the request schemas that are really validated, the answers and the errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.answers import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    DetokenizeAnswer,
    TokenizeAnswer,
)
from server.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

BODIES: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
ANSWERS: tuple[type[BaseModel], ...] = (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    TokenizeAnswer,
    DetokenizeAnswer,
)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS = {
    "400": "A field is wrong or not supported; `param` names it.",
    "401": "No API key, or an unknown one.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "The queue is full; see `retry-after`.",
    "500": "The request failed.",
    "503": "Loading, draining, or the engine stopped; see `retry-after`.",
    "504": "The request's time limit passed.",
}


def body_schema(
    body: type[BaseModel],
    answer: type[BaseModel] | None = None,
    chunk: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """For a route that reads its body itself: what FastAPI would have written about it.

    `chunk`: the payload of one server-sent event, for answers that may be streamed.
    """
    responses: dict[str, Any] = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _ERRORS.items()
    }
    content = {} if answer is None else {"application/json": {"schema": _reference(answer)}}
    if chunk is not None:
        content["text/event-stream"] = {"schema": _reference(chunk)}
    if content:
        responses["200"] = {"description": "The answer.", "content": content}
    taken = {"application/json": {"schema": _reference(body)}}
    return {"requestBody": {"required": True, "content": taken}, "responses": responses}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in (*BODIES, *ANSWERS)],
        ref_template="#/components/schemas/{model}",
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"], Error=_ERROR)
    return document
