"""The client over both transports: streams, merging, slow readers, aborts, shared engines."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from engine import stream as stream_module
from engine.client import EngineClient
from engine.core import EngineCore
from engine.errors import EngineDeadError, RejectedError
from engine.messages import Step
from engine.stream import RequestStream
from engine.transport import (
    LocalClientTransport,
    LocalEngineTransport,
    ZmqClientTransport,
    ZmqEngineTransport,
)
from scheduler.request import (
    Finish,
    FinishReason,
    Load,
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
)
from scheduler.scheduler import Scheduler
from tests.engine.workers import FACTS, ThreadedWorker, scheduler_config
from tests.fakes import Script


def request(name: str = "r", max_tokens: int = 8, n: int = 1, prompt=(1, 2, 3)) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=5)
    return Request(name, tuple(prompt), params, arrival=time.monotonic(), n=n)


class Link:
    """An engine on a thread of this process, reached through either transport."""

    def __init__(self, kind: str, folder, step_seconds: float = 0.0) -> None:
        self._address = f"ipc://{folder}/e.sock"
        zmq = kind == "zmq"
        self.transport = ZmqEngineTransport(self._address) if zmq else LocalEngineTransport()
        self.scheduler = Scheduler(scheduler_config())
        self.core = EngineCore(self.scheduler, ThreadedWorker(step_seconds), self.transport, FACTS)
        self.made: list = []
        self.lost: asyncio.Future[str] | None = None
        self._thread = threading.Thread(target=self.core.run)
        self._thread.start()

    async def connect(self, lost):
        self.lost = lost
        if isinstance(self.transport, LocalEngineTransport):
            identity = b"%d" % len(self.made)
            self.made.append(LocalClientTransport(self.transport, identity))
        else:
            self.made.append(ZmqClientTransport(self._address))
        return self.made[-1]

    async def close(self) -> None:
        pass

    def stop(self) -> None:
        self.core.drain(0.0)
        self.transport.wake()
        self._thread.join(10)
        self.transport.close()


@pytest.fixture(params=["local", "zmq"])
def link(request, tmp_path):
    made = Link(request.param, tmp_path)
    yield made
    made.stop()


@pytest.fixture
def slow_link(tmp_path):
    made = Link("zmq", tmp_path, step_seconds=0.01)
    yield made
    made.stop()


@contextlib.asynccontextmanager
async def connected(link: Link):
    client = EngineClient(link)
    await client.ready()
    try:
        yield client
    finally:
        await client.close()


async def until(true, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


async def test_streams_bring_every_choice_in_order(link):
    async with connected(link) as client:
        assert client.facts == FACTS
        wanted = [request(f"r{i}", max_tokens=3 + i, n=1 + i % 3) for i in range(6)]
        streams = [client.submit(each) for each in wanted]
        for each, stream in zip(wanted, streams, strict=True):
            seen: list[list[int]] = [[] for _ in range(each.n)]
            async for output in stream:
                seen[output.choice] += output.tokens
            assert [tuple(tokens) for tokens in seen] == [
                Script().answer(each, choice)[0] for choice in range(each.n)
            ]
            assert stream.tokens == seen
        assert client.stalled_seconds == 0


async def test_who_waits_for_its_first_token_is_told_first(link):
    client = EngineClient(link)
    told: list[str] = []

    async def read(name: str) -> None:
        client._streams[name] = stream = RequestStream(request(name), lambda: None)
        while True:
            await stream.batch()
            told.append(name)

    readers = [asyncio.create_task(read(name)) for name in ("old", "older", "new")]
    await asyncio.sleep(0)
    old = [Output(name, 0, (7,)) for name in ("old", "older")]
    for outputs in (old, [*old, Output("new", 0, (7,))]):
        client._receive(Step(tuple(outputs), Load()))
        await asyncio.sleep(0)
    for reader in readers:
        reader.cancel()
    assert told == ["old", "older", "new", "old", "older"]


async def test_leaving_a_stream_frees_what_it_held(link):
    async with connected(link) as client:
        async with client.submit(request(max_tokens=400, n=2)) as stream:
            await anext(stream)
        await until(lambda: not link.scheduler.has_work())
        link.scheduler.check()
        await until(lambda: "r" not in client._streams)  # once the end has arrived here, too
        assert client.submit(request(max_tokens=1)).request.id == "r"


async def test_a_cancelled_consumer_frees_what_it_held(link):
    async with connected(link) as client:

        async def consume() -> None:
            async with client.submit(request(max_tokens=400)) as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(consume())
        await until(lambda: client.load.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not link.scheduler.has_work())


async def test_refusals_and_misuse(link):
    async with connected(link) as client:
        with pytest.raises(RejectedError) as error:
            await client.submit(request(prompt=[1] * 600)).batch()
        assert error.value.code == "context_length_exceeded"
        client.submit(request("twice", max_tokens=300))
        with pytest.raises(ValueError, match="in use"):
            client.submit(request("twice"))
        client.abort("unknown")


async def test_a_lost_engine_is_a_pause(link):
    """The same engine takes the new connection; what it still sends on the old one is not heard."""
    async with connected(link) as client:
        wanted = request(max_tokens=400, n=2)
        stream = client.submit(wanted)
        await until(lambda: len(stream.tokens[0]) >= 3)
        link.lost.set_result("it died")
        seen: list[list[int]] = [[], []]
        async for output in stream:
            seen[output.choice] += output.tokens
        assert [tuple(tokens) for tokens in seen] == [
            Script().answer(wanted, choice)[0] for choice in range(2)
        ]
        assert stream.resumptions == 1


async def test_the_end_of_a_stream_comes_after_what_arrived(link):
    client = EngineClient(link)
    await client.ready()
    stream = client.submit(request(max_tokens=400))
    await until(lambda: len(stream.tokens[0]) >= 3)
    await client.close()
    assert stream.finished
    assert (await stream.batch())[0].tokens
    with pytest.raises(EngineDeadError, match="shutting down"):
        await stream.batch()


async def test_api_processes_share_an_engine_and_leave_it_alone(slow_link):
    async with connected(slow_link) as first:
        async with connected(slow_link) as second:
            kept = first.submit(request("same", max_tokens=60))
            left = second.submit(request("same", max_tokens=400, prompt=(9,)))
            await anext(kept)
            await anext(left)
        # The second one is gone without a word; its request goes with it.
        await until(lambda: slow_link.scheduler.load().running == 1)
        tokens = [token async for output in kept for token in output.tokens]
        expected = Script().answer(request(max_tokens=60))[0]
        assert tuple(kept.tokens[0]) == expected
        assert tuple(tokens) == expected[-len(tokens) :]
    slow_link.scheduler.check()


def stream_of(n: int = 1) -> tuple[RequestStream, list[str]]:
    aborts: list[str] = []
    return RequestStream(request(n=n), lambda: aborts.append("abort")), aborts


def output(*tokens: int, choice: int = 0, finish: FinishReason | None = None) -> Output:
    logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in tokens)
    ended = None if finish is None else Finish(finish)
    return Output("r", choice, tuple(tokens), logprobs, finish=ended)


async def test_a_reader_behind_gets_one_output_per_choice():
    stream, aborts = stream_of(n=2)
    for each in (output(1), output(7, choice=1), output(2, 3), output(finish=FinishReason.STOP)):
        stream.put(each)
    first, second = await stream.batch()
    assert (first.choice, first.tokens) == (0, (1, 2, 3))
    assert [entry.token for entry in first.logprobs] == [1, 2, 3]
    assert first.finish.reason is FinishReason.STOP
    assert (second.choice, second.tokens, second.finish) == (1, (7,), None)
    stream.put(output(8, choice=1, finish=FinishReason.LENGTH))
    assert (await stream.batch())[0].tokens == (8,)
    assert await stream.batch() == []
    stream.close()
    assert aborts == []  # it had ended


async def test_a_choice_ends_once():
    stream, _ = stream_of()
    stream.put(output(1, finish=FinishReason.STOP))
    stream.put(output(2, finish=FinishReason.ABORT))
    assert [o.tokens async for o in stream] == [(1,)]


async def test_an_arrival_takes_nothing_away():
    stream, _ = stream_of()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await stream.arrival()
    waiting = asyncio.create_task(stream.arrival())
    await asyncio.sleep(0)
    stream.put(output(7))
    await waiting
    stream.fail(EngineDeadError("gone"))
    await stream.arrival()  # what arrived comes before the end
    assert (await stream.batch())[0].tokens == (7,)
    with pytest.raises(EngineDeadError, match="gone"):
        await stream.arrival()


async def test_one_wake_up_per_message():
    stream, _ = stream_of(n=3)
    waiting = asyncio.create_task(stream.batch())
    await asyncio.sleep(0)
    for choice in range(3):  # one message of the engine: nothing runs in between
        stream.put(output(choice, choice=choice))
    assert len(await waiting) == 3


async def test_a_reader_too_slow_is_ended(monkeypatch):
    monkeypatch.setattr(stream_module, "MAX_UNREAD_TOKENS", 10)
    stream, aborts = stream_of(n=2)
    for i in range(20):
        stream.put(output(i))
    assert aborts == ["abort"]
    outputs = [o async for o in stream]
    assert sum(len(o.tokens) for o in outputs) == 11
    assert [o.finish.reason for o in outputs if o.finish] == [FinishReason.ERROR] * 2
    assert stream.finished
