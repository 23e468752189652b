"""Probes, load, models, tokenizing, unknown routes, the description."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

from scheduler.request import Load
from server.app import create_app
from tests.fakes_engine import FACTS
from tests.server.helpers import MODEL, TEXT, TOKENIZER, chat, client_of, config, reply_engine


async def get(path: str, **options):
    async with client_of(reply_engine(**options)) as client:
        return await client.get(path)


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready"])
async def test_probes(path: str) -> None:
    async with client_of(reply_engine()) as client:
        assert (await client.get(path)).status_code == 200
        assert (await client.head(path)).status_code == 200


async def test_version_and_load() -> None:
    assert (await get("/version")).json()["version"]
    load = (await get("/load", load=Load(running=3, waiting=2, pages_total=8, pages_held=2))).json()
    assert (load["running"], load["waiting"], load["kv_usage"]) == (3, 2, 0.25)
    assert load["server_load"] == 0


async def test_load_has_the_counters_of_speculation() -> None:
    counters = {"drafts": 4, "draft_tokens": 9, "accepted_tokens": 6, "draft_seconds": 0.5}
    counters |= {"ahead_seconds": 0.25, "ahead_rows": 3, "foreseen_rows": 2}
    load = (await get("/load", load=Load(**counters))).json()
    assert {name: load[name] for name in counters} == counters


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_models(prefix: str) -> None:
    async with client_of(reply_engine()) as client:
        (card,) = (await client.get(f"{prefix}/models")).json()["data"]
        assert card["id"] == MODEL
        assert card["object"] == "model"
        assert card["max_model_len"] == FACTS.max_model_len
        assert (await client.get(f"{prefix}/models/{MODEL}")).json() == card
        missing = await client.get(f"{prefix}/models/some/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes_are_json(method: str, path: str, status: int, code: str) -> None:
    async with client_of(reply_engine()) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("field", ["prompt", "content"])
async def test_tokenize_and_back(field: str) -> None:
    async with client_of(reply_engine()) as client:
        body = {field: "hello 🎉", "return_token_strs": True}
        answer = (await client.post("/tokenize", json=body)).json()
        assert answer["tokens"] == TOKENIZER.encode("hello 🎉")
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == FACTS.max_model_len
        back = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": "hello 🎉", "content": "hello 🎉"}


async def test_tokenize_a_conversation() -> None:
    messages = [{"role": "user", "content": "x"}]
    async with client_of(reply_engine()) as client:
        answer = (await client.post("/tokenize", json={"messages": messages})).json()
        text = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert text["prompt"] == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


async def test_render() -> None:
    async with client_of(reply_engine()) as client:
        answer = await client.post("/v1/chat/completions/render", json=chat("x"))
        bad = await client.post("/v1/chat/completions/render", json=chat("x", n=0))
    assert answer.json()["prompt"] == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert answer.json()["prompt_token_ids"] == TOKENIZER.encode(answer.json()["prompt"])
    assert bad.status_code == 400


async def test_the_description_holds_the_validated_schemas() -> None:
    document = (await get("/openapi.json")).json()
    post = document["paths"]["/v1/chat/completions"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatBody"}
    schemas = document["components"]["schemas"]
    assert schemas["ChatBody"]["required"] == ["messages"]
    assert set(post["responses"]) >= {"200", "400", "401", "404", "413", "429", "500", "503"}
    assert "/completions" not in document["paths"]
    references = [
        part.split('"')[0] for part in str(document).replace("'", '"').split("schemas/")[1:]
    ]
    assert set(references) <= set(schemas)


async def test_behind_a_proxy_that_strips_a_prefix() -> None:
    app = create_app(reply_engine(), TEXT, config(api_keys=("k",)))
    transport = httpx.ASGITransport(app=app, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        document = (await client.get("/llm/openapi.json")).json()
        assert (await client.get("/llm/health")).status_code == 200
        assert (await client.get("/llm/v1/models")).status_code == 401
    assert document["servers"] == [{"url": "/llm"}]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, server.app, server.run, text.assets\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'worker', 'models', 'kernels'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
