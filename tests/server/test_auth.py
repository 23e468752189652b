"""API keys, tenants, CORS."""

from __future__ import annotations

import os

import pytest

from server.auth import Keys
from tests.server.helpers import chat, client_of, config, reply_engine

PATH = "/v1/chat/completions"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("wrong"), 401),
        (bearer(""), 401),
        ({"authorization": "sk-1"}, 401),
        ({"authorization": "Basic sk-1"}, 401),
        ({"x-api-key": "wrong"}, 401),
        (bearer("sk-1"), 200),
        ({"authorization": "bearer  sk-2 "}, 200),
        ({"x-api-key": "sk-2"}, 200),
        (bearer("sk-é"), 401),
    ],
)
async def test_keys(headers: dict[str, str], status: int) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    async with client_of(reply_engine(), cfg=config(api_keys=("sk-1", "sk-2"))) as client:
        answer = await client.post(PATH, json=chat(), headers=encoded)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "sk-1" not in answer.text


async def test_what_is_open_and_what_is_not() -> None:
    async with client_of(reply_engine(), cfg=config(api_keys=("k",))) as client:
        for path in ("/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200, path
        for path in ("/v1/models", "/models", "/load", "/v1/nothing", "/nothing"):
            assert (await client.get(path)).status_code == 401, path
        for path in ("/tokenize", "/v1/completions", "/completions", "/v1/tokenize"):
            assert (await client.post(path, json={})).status_code == 401, path


async def test_without_keys_nobody_is_asked() -> None:
    engine = reply_engine()
    async with client_of(engine) as client:
        assert (await client.post(PATH, json=chat(), headers=bearer("any"))).status_code == 200
    assert engine.requests[0].tenant == ""


async def test_tenants_have_caches_of_their_own(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\nalice:key-a\nalice:key-a2\n\nbob:key-b\nplain\n")
    engine = reply_engine()
    async with client_of(engine, cfg=config(api_key_file=str(file))) as client:
        for key in ("key-a", "key-a2", "key-b", "plain"):
            assert (await client.post(PATH, json=chat(), headers=bearer(key))).status_code == 200
    tenants = [request.tenant for request in engine.requests]
    assert tenants[:3] == ["alice", "alice", "bob"]
    assert tenants[3].startswith("key-")
    assert "plain" not in tenants[3]
    salts = [request.cache_salt for request in engine.requests]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3


def test_the_file_is_read_again_when_it_changes(tmp_path) -> None:
    now = 0.0
    file = tmp_path / "keys"
    file.write_text("a:one\n")
    keys = Keys((), file, clock=lambda: now)
    assert keys.tenant("one") == "a"
    file.write_text("b:two\n# longer\n")
    assert keys.tenant("one") == "a"  # looked at once a second at most
    now = 2.0
    assert keys.tenant("one") is None
    assert keys.tenant("two") == "b"
    os.unlink(file)
    now = 4.0
    assert keys.tenant("two") == "b"  # a file that vanished locks nobody out


def test_a_missing_file_is_an_error_at_start(tmp_path) -> None:
    with pytest.raises(OSError, match="keys"):
        Keys((), tmp_path / "keys")


async def test_cors_only_for_configured_origins() -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with client_of(reply_engine(), cfg=config(api_keys=("k",))) as client:
        answer = await client.options(PATH, headers=preflight)
        assert "access-control-allow-origin" not in answer.headers
    cfg = config(api_keys=("k",), cors_origins=("https://a.example",))
    async with client_of(reply_engine(), cfg=cfg) as client:
        answer = await client.options(PATH, headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.options(PATH, headers={**preflight, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
