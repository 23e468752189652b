"""Bodies generated from our own description, legal and not: answers are 200 or 400, never 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.openapi import from_dict

from server.parameters import Endpoint, known
from tests.fakes_engine import ScriptedEngine
from tests.server.helpers import chat, completion, events

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BOUNDED = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
# Generating from a schema of some fifty optional fields takes most of the time.
FEWER = settings(BOUNDED, max_examples=15)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def send(app: FastAPI, path: str, data: bytes, kind: str = "application/json") -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=data, headers={"content-type": kind})

    return asyncio.run(post())


def check(answer: httpx.Response, body: Any) -> None:
    shown = (str(body)[:300], answer.text[:300])
    assert answer.status_code in (200, 400, 404), shown
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"], shown
        assert error["code"], shown
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert events(answer.content)[-1] == "[DONE]", shown
    else:
        answer.json()


@pytest.fixture(scope="module")
def app(shared: tuple[FastAPI, ScriptedEngine]) -> FastAPI:
    return shared[0]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_bodies_after_the_schema(app: FastAPI, path: str) -> None:
    operation = from_dict(app.openapi())[path]["POST"]

    @FEWER
    @given(case=operation.as_strategy())
    def run(case) -> None:
        check(send(app, path, json.dumps(case.body).encode()), case.body)

    run()


@pytest.mark.parametrize(("path", "legal"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_any_value_in_any_field(app: FastAPI, path: str, legal: Callable[..., Any]) -> None:
    endpoint = Endpoint.CHAT if path == CHAT else Endpoint.COMPLETIONS
    names = st.sampled_from([*known(endpoint), "unheard_of", ""])

    @BOUNDED
    @given(st.dictionaries(names, JSON, min_size=1, max_size=3))
    def run(fields: dict[str, Any]) -> None:
        body = {"max_tokens": 3, **legal(), **fields}
        check(send(app, path, json.dumps(body).encode()), body)

    run()


@BOUNDED
@given(st.sampled_from([CHAT, COMPLETIONS, "/tokenize", "/detokenize"]), st.binary(max_size=50))
def test_any_bytes(shared, path: str, data: bytes) -> None:
    check(send(shared[0], path, data), data)
