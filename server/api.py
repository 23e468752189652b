"""OpenAI's endpoints, and tokenizing."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.answers import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    DetokenizeAnswer,
    TokenizeAnswer,
)
from server.body import read_json
from server.errors import invalid, model_not_found
from server.openapi import body_schema
from server.parameters import Endpoint
from server.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from server.serve import generate, translated
from server.services import Services


def api_router(services: Services) -> APIRouter:
    """The routes below `/v1`, also served without the prefix."""
    router = APIRouter(tags=["api"])
    created = int(time.time())

    @router.post(
        "/chat/completions",
        summary="Continue a conversation",
        openapi_extra=body_schema(ChatBody, ChatAnswer, ChatChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """One JSON object, or server-sent events with `stream: true`."""
        return await generate(request, services, Endpoint.CHAT)

    @router.post(
        "/completions",
        summary="Continue a text",
        openapi_extra=body_schema(CompletionBody, CompletionAnswer, CompletionChunk),
    )
    async def completions(request: Request) -> Response:
        """One JSON object, or server-sent events with `stream: true`."""
        return await generate(request, services, Endpoint.COMPLETIONS)

    @router.post(
        "/chat/completions/render",
        summary="The prompt of a conversation, without generating",
        openapi_extra=body_schema(ChatBody),
    )
    async def render(request: Request) -> dict[str, Any]:
        """What `/v1/chat/completions` would hand to the model: text and token ids."""
        job = await translated(request, services, Endpoint.CHAT)
        ids = job.requests[0].prompt
        text = services.text.tokenizer.decode(ids, skip_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids, "count": len(ids)}

    def card(name: str) -> dict[str, Any]:
        facts = services.engine.facts
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "foresight",
            "root": services.names[0],
            "parent": None,
            "max_model_len": None if facts is None else facts.max_model_len,
        }

    @router.get("/models", summary="The served models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in services.names]}

    @router.get("/models/{model:path}", summary="One served model")
    async def model(model: str) -> dict[str, Any]:
        if model not in services.names:
            raise model_not_found(model[:256])
        return card(model)

    return router


def text_router(services: Services) -> APIRouter:
    """`/tokenize` and `/detokenize`."""
    router = APIRouter(tags=["text"])
    server = services.config.server
    tokenizer = services.text.tokenizer

    async def fields_of(request: Request) -> dict[str, Any]:
        return await read_json(
            request, max_bytes=server.max_body_bytes, max_depth=server.max_json_depth
        )

    @router.post(
        "/tokenize",
        summary="Token ids of a text",
        openapi_extra=body_schema(TokenizeBody, TokenizeAnswer),
    )
    async def tokenize(request: Request) -> dict[str, Any]:
        """Of `prompt` (or `content`), or of `messages` as the chat template renders them."""
        body = parse(TokenizeBody, await fields_of(request))
        translator = services.translator()
        translator.model(body.model)
        text = body.prompt if body.prompt is not None else body.content
        if (text is None) == (body.messages is None):
            raise invalid("Give either prompt or messages.", "prompt")
        if text is not None:
            ids = await translator.prompts.encode(
                text, add_special_tokens=body.add_special_tokens is not False, completion=0
            )
        else:
            ids = await translator.prompts.chat(body, completion=0)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": translator.limits.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.token_label(i) for i in ids]
        return answer

    @router.post(
        "/detokenize",
        summary="Text of token ids",
        openapi_extra=body_schema(DetokenizeBody, DetokenizeAnswer),
    )
    async def detokenize(request: Request) -> dict[str, str]:
        """The text, under both of the names clients look for."""
        body = parse(DetokenizeBody, await fields_of(request))
        translator = services.translator()
        translator.model(body.model)
        ids = translator.sampler.token_ids(body.tokens, "tokens")
        text = tokenizer.decode(ids, skip_special_tokens=bool(body.skip_special_tokens))
        return {"prompt": text, "content": text}

    return router
