"""Overload as clients see it: refusals, time limits of the queue, latency targets."""

from __future__ import annotations

import json

import pytest

from scheduler.request import Load
from tests.server.helpers import chat, client_of, config, events, reply_engine
from tests.server.test_metrics import value

PATH = "/v1/chat/completions"


async def test_a_request_that_never_started_is_504_and_may_be_retried() -> None:
    engine = reply_engine(queue_timeout=0.01, load=Load(predicted_wait=7.2))
    async with client_of(engine, cfg=config(queue_timeout_seconds=0.01)) as client:
        answer = await client.post(PATH, json=chat(n=2))
        text = (await client.get("/metrics")).text
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    assert "queue" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "8"
    assert answer.headers["retry-after-ms"] == "7200"
    assert "x-should-retry" not in answer.headers
    ended = value(text, "foresight_request_success_total", finished_reason="queue_timeout")
    assert ended == 2


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_that_never_started_ends_with_one_error_event(n: int) -> None:
    engine = reply_engine(queue_timeout=0.35)  # later than what could become a status
    async with client_of(engine, cfg=config(queue_timeout_seconds=0.35)) as client:
        answer = await client.post(PATH, json=chat(n=n, stream=True))
    assert answer.status_code == 200
    *roles, last = events(answer.content)
    assert last["error"]["code"] == "timeout"
    assert "[DONE]" not in roles
    assert [json.dumps(event) for event in roles if "error" in event] == []
