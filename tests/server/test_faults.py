"""Overload, draining, an engine that dies, clients that leave: who is told what."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import httpx
import pytest

from engine.errors import RejectedError
from scheduler.request import FinishReason, Load
from server.admission import Admission
from server.app import create_app
from tests.fakes_engine import ScriptedEngine
from tests.server.helpers import (
    TEXT,
    chat,
    client_of,
    completion,
    config,
    events,
    reply_engine,
    streamed_text,
)

PATH = "/v1/chat/completions"


async def refused(engine: ScriptedEngine, body=None):
    async with client_of(engine) as client:
        answer = await client.post(PATH, json=body or chat())
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer, error


@pytest.mark.parametrize("waiting", [2048, 5000])
async def test_a_full_queue_is_429_with_the_time_to_wait(waiting: int) -> None:
    engine = reply_engine(load=Load(waiting=waiting, pages_total=64))
    answer, error = await refused(engine)
    assert answer.status_code == 429
    assert error["code"] == "server_overloaded"
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert int(answer.headers["retry-after-ms"]) >= 1000
    assert engine.requests == []


async def test_a_request_with_more_choices_than_room_is_refused() -> None:
    engine = reply_engine(load=Load(waiting=2040, pages_total=64))
    assert (await refused(engine, chat(n=20)))[0].status_code == 429
    async with client_of(engine) as client:
        assert (await client.post(PATH, json=chat(n=2))).status_code == 200


async def test_an_idle_server_takes_more_choices_than_its_queue_holds() -> None:
    cfg = config()
    schedule = replace(cfg.engine.schedule, max_queued_requests=3)
    cfg = replace(cfg, engine=replace(cfg.engine, schedule=schedule))
    async with client_of(reply_engine(), cfg=cfg) as client:
        assert (await client.post(PATH, json=chat(n=9))).status_code == 200


def test_requests_sent_since_the_last_word_of_the_engine_count() -> None:
    admission = Admission(reply_engine(), max_waiting=10)
    admission.enter(9)
    assert admission.ready
    admission.enter(1)
    assert not admission.ready
    admission.leave(3)
    assert admission.ready


async def test_the_time_to_wait_is_a_share_of_the_predicted_wait() -> None:
    for wait, told in ((0.0, "1"), (4096.0, "2")):
        engine = reply_engine(load=Load(waiting=2048, pages_total=64, predicted_wait=wait))
        answer, error = await refused(engine, chat(n=2))
        assert (answer.status_code, error["code"]) == (429, "server_overloaded")
        assert answer.headers["retry-after"] == told


async def test_loading_is_503_and_not_ready_but_alive() -> None:
    engine = reply_engine(facts=None, serving=False)
    answer, error = await refused(engine)
    assert (answer.status_code, error["code"]) == (503, "service_unavailable")
    assert answer.headers["retry-after"]
    async with client_of(engine) as client:
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 503
        assert (await client.get("/v1/models")).status_code == 200


async def test_liveness_is_the_engines() -> None:
    async with client_of(reply_engine(healthy=False)) as client:
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ping")).status_code == 503


async def test_draining_refuses_the_new_and_finishes_the_old() -> None:
    engine = reply_engine(delay=0.005)
    app = create_app(engine, TEXT, config())
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        old = asyncio.create_task(client.post(PATH, json=chat()))
        while not engine.requests:
            await asyncio.sleep(0.001)
        app.state.services.admission.draining = True
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        refused = await client.post(PATH, json=chat())
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert (await old).status_code == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("queue_full", 429),
        ("queue_tokens", 429),
        ("ttft_target", 429),
        ("deadline", 429),
        ("draining", 503),
        ("invalid", 400),
        ("context_length_exceeded", 400),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_by_the_engine(code: str, status: int, stream: bool) -> None:
    engine = reply_engine(reject=RejectedError(code, "because"))
    answer, error = await refused(engine, chat(stream=stream))
    assert answer.status_code == status
    assert "because" in error["message"]


@pytest.mark.parametrize(
    ("fault", "status", "code", "message"),
    [
        ({"die_after": 2}, 503, "service_unavailable", "stopped"),
        ({"fail_after": 2}, 500, "server_error", "scripted"),
        ({"abort_after": 2}, 503, "service_unavailable", "ended"),
    ],
)
async def test_failures_without_a_stream(fault, status: int, code: str, message: str) -> None:
    answer, error = await refused(reply_engine(**fault))
    assert (answer.status_code, error["code"]) == (status, code)
    assert message in error["message"]


async def test_a_deadline_is_504_and_not_to_be_retried() -> None:
    engine = reply_engine(delay=0.01, late_after=3)
    async with client_of(engine, cfg=config(request_timeout_seconds=0.02)) as client:
        answer = await client.post(PATH, json=chat())
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    assert answer.headers["x-should-retry"] == "false"


async def test_faults_of_ours_are_500_without_details(monkeypatch) -> None:
    monkeypatch.setattr("server.serve.chat_answer", lambda *_: 1 / 0)
    answer, error = await refused(reply_engine())
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"]
    assert "division" not in error["message"]


async def test_a_stop_string_that_was_shown_survives_the_engines_death() -> None:
    engine = reply_engine("a STOP b")
    dying = engine.abort
    engine.abort = lambda *args: engine.die()  # type: ignore[method-assign]
    async with client_of(engine) as client:
        answer = await client.post(PATH, json=chat(stop="STOP"))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "a "
    assert dying is not None


async def test_the_engines_last_word_is_not_waited_for_forever(monkeypatch) -> None:
    monkeypatch.setattr("server.generation.LAST_WORD_SECONDS", 0.02)
    engine = reply_engine("a STOP b", stall_after=8)
    engine.abort = lambda *args: None  # type: ignore[method-assign]
    async with client_of(engine) as client:
        answer = await client.post(PATH, json=chat(stop="STOP"))
    assert answer.json()["choices"][0]["message"]["content"] == "a "


class Leaver:
    """An ASGI client that sends a request and leaves when told to."""

    def __init__(self, app, body: bytes, path: str = PATH) -> None:
        self.left = asyncio.Event()
        self.sent: list[dict] = []
        self._body: bytes | None = body
        headers = [(b"content-type", b"application/json")]
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": headers,
            "client": ("1.2.3.4", 5),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(self.scope, self._receive, self._send))

    async def _receive(self):
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stall", [None, 2])
async def test_when_the_client_leaves_the_work_ends(stream: bool, stall, caplog) -> None:
    import orjson

    engine = reply_engine(delay=0.005, stall_after=stall, eos=False)
    app = create_app(engine, TEXT, config())
    with caplog.at_level(logging.INFO, "foresight.access"):
        client = Leaver(app, orjson.dumps(chat(stream=stream, n=2)))
        while len(engine._made) < 2:
            await asyncio.sleep(0.005)
        client.left.set()
        await asyncio.wait_for(client.task, 1)
    (request,) = engine.requests
    assert (request.id, None, FinishReason.ABORT, None) in engine.aborts
    await asyncio.sleep(0)
    assert engine.running == 0
    assert app.state.services.admission.in_flight == 0
    (record,) = caplog.records
    assert record.status == 499
    assert record.finish == ["abort", "abort"]
    assert not any(b"[DONE]" in m.get("body", b"") for m in client.sent)
    assert app.state.services.metrics.success.values == {"abort": 2}


async def test_a_client_that_leaves_before_its_body_arrived(caplog) -> None:
    engine = reply_engine()
    app = create_app(engine, TEXT, config())
    with caplog.at_level(logging.INFO, "foresight.access"):
        client = Leaver(app, b"")
        client._body = None
        client.left.set()
        await asyncio.wait_for(client.task, 1)
    assert engine.requests == []
    assert caplog.records[0].status == 499


async def test_one_log_line_a_request_without_its_text(caplog) -> None:
    engine = reply_engine("secret answer")
    async with client_of(engine) as client:
        with caplog.at_level(logging.INFO, "foresight.access"):
            await client.post(PATH, json=chat("secret question"), headers={"x-request-id": "r1"})
            await client.get("/health")
            await client.get("/metrics")
            await client.post(PATH, json=chat(max_tokens=0))
    good, bad = caplog.records
    assert (good.request_id, good.status, good.finish) == ("r1", 200, ["stop"])
    assert good.model == "org/tiny"
    assert good.prompt_tokens == len(engine.requests[0].prompt)
    assert good.seed == engine.requests[0].params.seed
    assert good.first_token_ms > 0
    assert "secret" not in str(vars(good))
    assert (bad.status, bad.error) == (400, bad.error)
    assert "max_tokens" in bad.error


async def test_the_log_line_tells_of_drafts(caplog) -> None:
    async with client_of(reply_engine(drafts=(7, 5))) as client:
        with caplog.at_level(logging.INFO, "foresight.access"):
            await client.post(PATH, json=chat(n=2))
    (record,) = caplog.records
    assert (record.drafted_tokens, record.accepted_tokens) == (14, 10)


def told(answer: httpx.Response, stream: bool) -> object:
    """What a client reads, without ids and times."""
    if not stream:
        return answer.json()["choices"], answer.json()["usage"]
    found = events(answer.content)
    assert found[-1] == "[DONE]"
    return [streamed_text(found, choice) for choice in range(2)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_outlived_its_engine_says_so_in_the_log_alone(
    stream: bool, caplog
) -> None:
    body = chat(stream=stream, n=2)
    async with client_of(reply_engine()) as client:
        undisturbed = await client.post(PATH, json=body)
    app = create_app(reply_engine(resume_after=4), TEXT, config())
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        with caplog.at_level(logging.INFO, "foresight.access"):
            answer = await client.post(PATH, json=body)
    assert told(answer, stream) == told(undisturbed, stream)
    (record,) = caplog.records
    assert (record.status, record.resumptions) == (200, 1)
    assert record.finish == ["stop", "stop"]
    assert record.queue_ms is None, "nobody knows when it was first admitted"
    metrics = app.state.services.metrics
    assert metrics.resumed.values == {"": 1}
    assert sum(metrics.queue.counts) == sum(metrics.prefill.counts) == 0
    assert sum(metrics.e2e.counts) == 2


async def test_prompts_are_logged_on_demand(caplog) -> None:
    cfg = config(log_prompts=True)
    async with client_of(reply_engine("an answer"), cfg=cfg) as client:
        with caplog.at_level(logging.INFO, "foresight.access"):
            await client.post("/v1/completions", json=completion("a question"))
    (record,) = caplog.records
    assert (record.prompts, record.outputs) == (["a question"], ["an answer"])
