"""Overload as clients see it: refusals, time limits of the queue, latency targets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine.errors import RejectedError
from scheduler.request import Finish, FinishReason, Load, Refusal, Request, SamplingParams
from server.metrics import Metrics
from server.observe import Observer
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


async def test_targets_met_and_missed_are_counted() -> None:
    engine = reply_engine(delay=0.01)
    async with client_of(engine) as client:
        for slo in ({"ttft": 50, "mtpot": 50}, {"ttft": 1e-4, "mtpot": 1e-4}, {"mtpot": 50}, None):
            answer = await client.post(PATH, json=chat(n=2, slo=slo))
            assert answer.status_code == 200
        text = (await client.get("/metrics")).text
    for name, met, missed in (("ttft", 2, 2), ("mtpot", 4, 2)):
        metric = f"foresight_{name}_target_requests_total"
        assert value(text, metric, outcome="met") == met
        assert value(text, metric, outcome="missed") == missed


async def test_who_was_never_started_has_missed_the_servers_target() -> None:
    cfg = config(queue_timeout_seconds=0.01)
    schedule = replace(cfg.engine.schedule, ttft_target=1e-3)
    cfg = replace(cfg, engine=replace(cfg.engine, schedule=schedule))
    async with client_of(reply_engine(queue_timeout=0.01), cfg=cfg) as client:
        await client.post(PATH, json=chat())
        text = (await client.get("/metrics")).text
        assert value(text, "foresight_ttft_target_requests_total", outcome="missed") == 1
        assert value(text, "foresight_predicted_wait_seconds") == 0.0
        assert (await client.get("/load")).json()["predicted_wait"] == 0.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", list(Refusal))
async def test_each_refusal_is_429_with_the_time_and_counted(reason: Refusal, stream: bool) -> None:
    engine = reply_engine(reject=RejectedError(reason, "too much", 3.25))
    async with client_of(engine) as client:
        answer = await client.post(PATH, json=chat(stream=stream))
        text = (await client.get("/metrics")).text
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "server_overloaded"
    assert answer.headers["retry-after"] == "4"
    assert answer.headers["retry-after-ms"] == "3250"
    assert value(text, "foresight_admission_rejections_total", reason=str(reason)) == 1


async def test_no_client_chooses_its_tenant() -> None:
    engine = reply_engine()
    named = {"x-tenant": "a", "x-api-key": "a:b", "authorization": "Bearer a:b"}
    async with client_of(engine) as client:
        await client.post(PATH, json=chat(user="a", tenant="a"), headers=named)
    assert engine.requests[0].tenant == ""


def test_predictions_are_held_against_what_came() -> None:
    metrics = Metrics("m", Load, lambda: None)
    request = Request("r", (1,), SamplingParams(max_tokens=1), 100.0)
    times = {"arrival": 100.0, "admitted": 103.0, "first_token": 104.0, "finished": 105.0}
    for predicted in (None, 102.0, 108.0):
        finish = Finish(FinishReason.STOP, **times, predicted_first_token=predicted)
        Observer(metrics).finished(request, 0, finish)
    assert metrics.wait_ratio.total == 2.0 + 0.5
    assert sum(metrics.wait_ratio.counts) == 2
