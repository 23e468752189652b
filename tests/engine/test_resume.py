"""Streams that outlive their engine, on a wire that the test speaks on itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest

from engine.client import EngineClient
from engine.errors import EngineDeadError, EngineGoneError, RejectedError
from engine.messages import (
    Abort,
    Dead,
    Drain,
    FromEngine,
    Hello,
    Ready,
    Rejected,
    Step,
    Submit,
    ToEngine,
)
from engine.stream import MAX_RESUMPTIONS, RequestStream
from scheduler.request import (
    Finish,
    FinishReason,
    Load,
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
)
from tests.engine.workers import FACTS

STOPPED = Finish(FinishReason.STOP, completion_tokens=3)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Wire:
    """One engine's connection."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.closed = False
        self._heard = lambda message: None

    def listen(self, on_message) -> None:
        self._heard = on_message

    def send(self, message: ToEngine) -> None:
        assert not self.closed
        self.sent.append(message)

    def close(self) -> None:
        self.closed = True

    def say(self, message: FromEngine) -> None:
        self._heard(message)

    def tokens(
        self, name: str, *tokens: int, choice: int = 0, finish=None, demoted: int = 0
    ) -> None:
        logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in tokens)
        output = Output(name, choice, tokens, logprobs, finish=finish, demoted=demoted)
        self.say(Step((output,), Load()))

    def requests(self) -> list[Request]:
        return [message.request for message in self.sent if isinstance(message, Submit)]

    def ages(self) -> list[float]:
        return [message.age for message in self.sent if isinstance(message, Submit)]


class Engines:
    """An `EngineLink` to one engine after the other."""

    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.failure: Exception | None = None
        self._lost: asyncio.Future[str] | None = None

    async def connect(self, lost) -> Wire:
        if self.failure is not None:
            raise self.failure
        self._lost = lost
        self.wires.append(Wire())
        return self.wires[-1]

    async def close(self) -> None:
        pass

    @property
    def wire(self) -> Wire:
        return self.wires[-1]

    async def die(self, reason: str = "it died") -> None:
        """And the client has heard of it, and connected to the next, which is not ready."""
        self._lost.set_result(reason)
        for _ in range(5):
            await asyncio.sleep(0)

    async def ready(self, facts=FACTS) -> Wire:
        self.wire.say(Ready(facts))
        await asyncio.sleep(0)
        return self.wire


@contextlib.asynccontextmanager
async def serving(clock: Clock | None = None) -> AsyncIterator[tuple[EngineClient, Engines]]:
    engines = Engines()
    client = EngineClient(engines, clock=clock or Clock())
    await client.start()
    await asyncio.sleep(0)
    await engines.ready()
    try:
        yield client, engines
    finally:
        await client.close()


def request(name: str = "r", n: int = 1, **changes) -> Request:
    params = SamplingParams(max_tokens=20, seed=7, logprobs=1, prompt_logprobs=1)
    return Request(name, (1, 2, 3), params, arrival=98.0, n=n, **changes)


async def read(stream: RequestStream) -> list[Output]:
    return [output async for output in stream]


async def test_the_next_engine_gets_what_the_last_one_committed():
    async with serving() as (client, engines):
        wanted = request(n=3)
        stream = client.submit(wanted)
        engines.wire.tokens("r", 5, 6)
        engines.wire.tokens("r", 8, 9, 10, choice=1, finish=STOPPED)
        first = engines.wire
        await engines.die()
        assert first.closed
        assert not client.serving
        with pytest.raises(EngineDeadError):
            client.submit(request("between"))
        second = await engines.ready()
        assert client.serving
        assert isinstance(second.sent[0], Hello)
        (resumed,) = second.requests()
        assert resumed == replace(wanted, produced=((5, 6), None, ()))
        second.tokens("r", 7, finish=Finish(FinishReason.LENGTH, completion_tokens=3))
        second.tokens("r", 4, choice=2, finish=Finish(FinishReason.LENGTH, completion_tokens=1))
        outputs = await read(stream)
        tokens = [[t for o in outputs if o.choice == c for t in o.tokens] for c in range(3)]
        assert tokens == [[5, 6, 7], [8, 9, 10], [4]]
        scored = [[e.token for o in outputs if o.choice == c for e in o.logprobs] for c in range(3)]
        assert scored == tokens
        ends = {o.choice: o.finish for o in outputs if o.finish is not None}
        assert [ends[choice].resumptions for choice in range(3)] == [1, 0, 1]
        assert client.stalled_seconds == 0


async def test_what_an_engine_that_died_had_demoted_is_not_forgotten():
    async with serving() as (client, engines):
        stream = client.submit(request(n=2))
        engines.wire.tokens("r", 5, demoted=32)
        engines.wire.tokens("r", 8, choice=1)
        await engines.die()
        wire = await engines.ready()
        wire.tokens("r", 6, finish=STOPPED)
        wire.tokens("r", 9, choice=1, finish=replace(STOPPED, demoted=16))
        ends = {o.choice: o.finish for o in await read(stream) if o.finish is not None}
        assert [ends[choice].demoted for choice in range(2)] == [32, 16]


async def test_streams_go_on_in_their_order_before_anybody_new():
    async with serving() as (client, engines):
        for name in ("b", "a", "c"):
            client.submit(request(name))
        engines.wire.tokens("a", 1)
        resumed: list[str] = []
        client.on_resume = lambda each: resumed.append(each.id)
        await engines.die()
        assert resumed == []
        wire = await engines.ready()
        client.submit(request("new"))
        assert [each.id for each in wire.requests()] == ["b", "a", "c", "new"]
        assert resumed == ["b", "a", "c"]
        assert [each.resumed for each in wire.requests()] == [True, True, True, False]
        assert wire.ages() == [2.0, 2.0, 2.0, 0.0]


async def test_last_words_and_the_death_after_them_are_one_loss():
    async with serving() as (client, engines):
        stream = client.submit(request())
        engines.wire.tokens("r", 1)
        engines.wire.say(Dead("a fault"))
        assert not client.serving
        await engines.die()
        (resumed,) = (await engines.ready()).requests()
        assert resumed.produced == ((1,),)
        assert stream.resumptions == 1


async def test_an_engine_that_dies_before_it_is_ready_counts_for_nobody():
    async with serving() as (client, engines):
        stream = client.submit(request())
        for _ in range(MAX_RESUMPTIONS + 1):
            await engines.die()
        await engines.ready()
        assert stream.resumptions == 1
        assert not stream.finished


async def test_a_request_is_resumed_so_often_and_the_others_live_on():
    async with serving() as (client, engines):
        deadly = client.submit(request("deadly"))
        for i in range(MAX_RESUMPTIONS):
            await engines.die()
            await engines.ready()
            assert deadly.resumptions == i + 1
        other = client.submit(request("other"))
        await engines.die("killed once more")
        with pytest.raises(EngineDeadError, match="killed once more"):
            await read(deadly)
        wire = await engines.ready()
        assert [each.id for each in wire.requests()] == ["other"]
        wire.tokens("other", 1, finish=STOPPED)
        assert (await read(other))[-1].finish.reason is FinishReason.STOP


async def test_without_another_engine_every_stream_ends_with_the_reason():
    async with serving() as (client, engines):
        stream = client.submit(request())
        engines.wire.tokens("r", 1)
        engines.failure = EngineGoneError("it died 3 times in a row")
        await engines.die()
        assert (await stream.batch())[0].tokens == (1,)
        with pytest.raises(EngineDeadError, match="3 times"):
            await stream.batch()
        assert isinstance(client.failure, EngineGoneError)


async def test_an_abort_without_an_engine_ends_the_stream_at_once():
    async with serving() as (client, engines):
        left, kept = client.submit(request("left", n=2)), client.submit(request("kept", n=2))
        engines.wire.tokens("kept", 1, 2, 3, choice=1)
        await engines.die()
        left.close()
        assert left.finished
        client.abort("kept", 1, FinishReason.STOP, tokens_kept=2)
        (ended,) = await kept.batch()
        assert ended.finish.reason is FinishReason.STOP
        assert (ended.finish.prompt_tokens, ended.finish.completion_tokens) == (3, 2)
        (resumed,) = (await engines.ready()).requests()
        assert resumed == replace(request("kept", n=2), produced=((), None))
        assert not kept.finished


async def test_what_was_aborted_and_not_confirmed_is_not_resumed():
    async with serving() as (client, engines):
        left, half = client.submit(request("left")), client.submit(request("half", n=2))
        engines.wire.tokens("half", 1, 2)
        left.close()
        client.abort("half", 0, FinishReason.STOP, tokens_kept=1)
        assert [type(m) for m in engines.wire.sent[-2:]] == [Abort, Abort]
        await engines.die()
        assert left.finished
        (told,) = await half.batch()
        assert told.finish.completion_tokens == 1
        (resumed,) = (await engines.ready()).requests()
        assert (resumed.id, resumed.produced) == ("half", (None, ()))


async def test_time_limits_go_on_without_an_engine():
    clock = Clock()
    async with serving(clock) as (client, engines):
        late = client.submit(request("late", deadline=100.05, n=2))
        queued = client.submit(request("queued", queue_deadline=100.02))
        begun = client.submit(request("begun", queue_deadline=100.02, deadline=130.0))
        engines.wire.tokens("begun", 1)
        await engines.die()

        async def tick() -> None:
            while True:
                clock.now += 0.01
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        waited = await asyncio.wait_for(read(queued), 5)
        ended = await asyncio.wait_for(read(late), 5)
        ticking.cancel()
        assert [o.finish.reason for o in waited] == [FinishReason.QUEUE_TIMEOUT]
        assert [o.finish.reason for o in ended] == [FinishReason.TIMEOUT] * 2
        clock.now = 110.0
        wire = await engines.ready()
        (resumed,) = wire.requests()
        # It had its turn; what is left of its time is counted from its arrival.
        assert (resumed.id, resumed.queue_deadline, resumed.deadline) == ("begun", None, 130.0)
        assert wire.ages() == [12.0]
        assert not begun.finished


async def test_what_the_next_engine_refuses_ends_with_an_error():
    async with serving() as (client, engines):
        stream = client.submit(request())
        await engines.die()
        (await engines.ready()).say(Rejected("r", "invalid", "no"))
        with pytest.raises(EngineDeadError):
            await read(stream)


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        ({}, True),
        ({"device": "other"}, False),
        ({"dtype": "other"}, False),
        ({"vocab_size": 51}, False),
        ({"max_model_len": 23}, True),  # all that this request may reach
        ({"max_model_len": 22}, False),
        ({"num_pages": 6}, False),  # of four tokens, one of them the null page
        ({"num_pages": 7}, True),
    ],
)
async def test_an_engine_that_would_answer_otherwise_resumes_nothing(changes, goes_on: bool):
    async with serving() as (client, engines):
        stream = client.submit(request())
        await engines.die()
        wire = await engines.ready(msgspec.structs.replace(FACTS, **changes))
        assert bool(wire.requests()) == goes_on
        if not goes_on:
            with pytest.raises(EngineDeadError, match="computes otherwise"):
                await read(stream)
        assert client.serving


@pytest.mark.parametrize(("max_model_len", "goes_on"), [(511, False), (512, True), (513, False)])
def test_where_the_context_ends_an_answer_it_has_to_be_the_same(max_model_len, goes_on: bool):
    params = SamplingParams(max_tokens=1000)
    after = msgspec.structs.replace(FACTS, max_model_len=max_model_len)
    assert after.continues(FACTS, Request("r", (1, 2, 3), params, 0.0)) == goes_on


async def test_a_drain_waits_for_the_next_engine_and_no_longer_than_it_may():
    clock = Clock()
    async with serving(clock) as (client, engines):
        stream = client.submit(request())
        await engines.die()
        draining = asyncio.create_task(client.drain(5.0))
        await asyncio.sleep(0)
        with pytest.raises(RejectedError):
            client.submit(request("late"))
        clock.now += 2.0
        wire = await engines.ready()
        assert [type(m) for m in wire.sent] == [Hello, Submit, Drain]
        assert wire.sent[-1] == Drain(3.0)
        await engines.die()
        await asyncio.sleep(0.05)
        assert not draining.done()
        clock.now += 3.0
        await asyncio.wait_for(draining, 1)
        with pytest.raises(EngineDeadError, match="shutting down"):
            await read(stream)


async def test_a_drain_that_has_nothing_left_asks_for_no_other_engine():
    async with serving() as (client, engines):
        stream = client.submit(request())
        draining = asyncio.create_task(client.drain(5.0))
        await asyncio.sleep(0)
        engines.wire.tokens("r", 1, finish=STOPPED)
        await engines.die()
        await asyncio.wait_for(draining, 1)
        assert len(engines.wires) == 1
        assert await client.gone() is None
        assert len(await read(stream)) == 1
