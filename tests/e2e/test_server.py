"""The whole server with the bundled model, driven by the official client and by accidents."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.serving import Running, serve

QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat_answers_from_the_bundled_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    text = answer.choices[0].message.content
    assert text is not None
    assert "join" in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 3


def test_stream_and_whole_answer_are_the_same(client: openai.OpenAI) -> None:
    for fields in ({"temperature": 0}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}):
        whole = client.chat.completions.create(model="demo", messages=QUESTION, **fields)
        stream = client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
            **fields,
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_models_and_choices(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]
    answer = client.completions.create(
        model="demo", prompt=["import os", "def add(a, b):"], max_tokens=8, n=2, seed=1, logprobs=2
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert all(c.logprobs is not None for c in answer.choices)


def test_scoring_as_evaluation_harnesses_do(server: Running) -> None:
    """Token-id prompts, echo and logprobs: one logprob a token, the first null."""
    prompt = httpx.post(f"{server.url}/tokenize", json={"prompt": "import os, sys"}).json()
    body = {
        "model": "demo",
        "prompt": [prompt["tokens"]],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
        "seed": 1234,
    }
    choice = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert len(logprobs) == prompt["count"] + 1
    assert logprobs[0] is None
    assert all(value <= 0 for value in logprobs[1:])


def test_same_seed_same_text_in_any_company(client: openai.OpenAI, server: Running) -> None:
    ask = {"model": "demo", "prompt": "import", "max_tokens": 24, "temperature": 1.0, "seed": 42}
    alone = client.completions.create(**ask).choices[0].text

    async def crowd() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as many:
            answers = await asyncio.gather(
                *(many.completions.create(**ask | {"seed": 42 + i % 4}) for i in range(16))
            )
        return [a.choices[0].text for a in answers]

    together = asyncio.run(crowd())
    assert {together[i] for i in range(0, 16, 4)} == {alone}
    assert len(set(together)) == 4


def test_two_hundred_abandoned_streams_leave_nothing_behind(server: Running) -> None:
    body = json.dumps(
        {
            "model": "demo",
            "prompt": "import",
            "max_tokens": 4000,
            "ignore_eos": True,
            "stream": True,
            "temperature": 1.0,
        }
    )

    async def abandon() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=30, limits=limits) as http:

            async def one() -> None:
                async with http.stream(
                    "POST",
                    f"{server.url}/v1/completions",
                    content=body,
                    headers={"content-type": "application/json"},
                ) as response:
                    assert response.status_code == 200
                    async with asyncio.timeout(0.5):
                        async for _ in response.aiter_raw():
                            pass

            ends = await asyncio.gather(*(one() for _ in range(200)), return_exceptions=True)
        assert all(isinstance(end, TimeoutError) for end in ends)

    asyncio.run(abandon())
    started = time.monotonic()
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "demo", "prompt": "import", "max_tokens": 4},
        timeout=30,
    )
    assert answer.status_code == 200
    assert time.monotonic() - started < 2
    _wait_for_idle(server)


def _wait_for_idle(server: Running) -> None:
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        load = httpx.get(f"{server.url}/load").json()
        if not load["running"] and not load["waiting"]:
            break
        time.sleep(0.1)
    assert server.gauge("foresight_num_requests_running") == 0
    assert server.gauge("foresight_num_requests_waiting") == 0
    assert server.gauge("foresight_kv_cache_usage_perc") == 0


def _start_stream(server: Running, http: httpx.Client, tokens: int) -> Iterator[str]:
    """The lines of a long answer, the first of them already received."""
    request = http.build_request(
        "POST",
        f"{server.url}/v1/completions",
        json={
            "model": "demo",
            "prompt": "import",
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        },
    )
    response = http.send(request, stream=True)
    assert response.status_code == 200
    lines = response.iter_lines()
    next(lines)
    return lines


def test_sigterm_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    with serve(tmp_path / "log") as server, httpx.Client(timeout=60) as http:
        streams = [_start_stream(server, http, 200) for _ in range(3)]
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with httpx.Client() as other:
            try:
                refused = other.post(
                    f"{server.url}/v1/completions",
                    json={"model": "demo", "prompt": "x", "max_tokens": 1},
                )
            except httpx.TransportError:
                pass  # no longer listening is a refusal too
            else:
                assert refused.status_code == 503
                assert "retry-after" in refused.headers
        for lines in streams:
            events = [line for line in lines if line]
            assert events[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in events[-2]
        assert server.process.wait(30) == 0
