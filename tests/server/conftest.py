"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from tests.fakes_engine import ScriptedEngine
from tests.server.helpers import TEXT, config, reply_engine

Post = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(scope="session")
def shared() -> tuple[FastAPI, ScriptedEngine]:
    """One app for tests that send many small requests: building one costs more than they do."""
    engine = reply_engine()
    return create_app(engine, TEXT, config()), engine


@pytest.fixture
def engine(shared: tuple[FastAPI, ScriptedEngine]) -> ScriptedEngine:
    """The shared app's engine, with nothing recorded."""
    shared[1].requests.clear()
    shared[1].aborts.clear()
    return shared[1]


@pytest.fixture
def post(shared: tuple[FastAPI, ScriptedEngine]) -> Post:
    """Send a request to the shared app."""

    async def send(path: str, **request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=shared[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, **request)

    return send
