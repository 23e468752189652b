"""Answers have the shapes that /openapi.json promises, with nothing undocumented in them."""

from __future__ import annotations

from typing import Any

import pytest

from server.openapi import ANSWERS
from tests.server.helpers import chat, client_of, completion, events, reply_engine

FULL: dict[str, Any] = {
    "n": 2,
    "max_tokens": 6,
    "return_token_ids": True,
    "timings": True,
    "metadata": {"a": "b"},
    "stop": "wör",
}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
CHAT_FULL = {**FULL, "logprobs": True, "top_logprobs": 2}
COMPLETION_FULL = {**FULL, "logprobs": 2, "echo": True}


SHAPES = {shape.__name__: shape for shape in ANSWERS}


@pytest.mark.parametrize(
    ("path", "body", "schema"),
    [
        ("/v1/chat/completions", chat(), "ChatAnswer"),
        ("/v1/chat/completions", chat(**CHAT_FULL, prompt_logprobs=1), "ChatAnswer"),
        ("/v1/completions", completion(), "CompletionAnswer"),
        ("/v1/completions", completion(**COMPLETION_FULL, prompt_logprobs=1), "CompletionAnswer"),
        ("/v1/chat/completions", chat(stream=True), "ChatChunk"),
        ("/v1/chat/completions", chat(**CHAT_FULL, **USAGE, stream=True), "ChatChunk"),
        ("/v1/completions", completion(stream=True), "CompletionChunk"),
        ("/v1/completions", completion(**COMPLETION_FULL, **USAGE, stream=True), "CompletionChunk"),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, "TokenizeAnswer"),
        ("/detokenize", {"tokens": [1, 2]}, "DetokenizeAnswer"),
    ],
)
async def test_shapes(path: str, body: dict[str, Any], schema: str) -> None:
    async with client_of(reply_engine()) as client:
        document = (await client.get("/openapi.json")).json()
        answer = await client.post(path, json=body)
    if schema.endswith("Chunk"):
        *chunks, _ = events(answer.content)
        for chunk in chunks:
            SHAPES[schema].model_validate(chunk, strict=True)
    else:
        SHAPES[schema].model_validate(answer.json(), strict=True)
    assert document["components"]["schemas"][schema]["additionalProperties"] is False
