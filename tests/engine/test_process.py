"""Real engine processes, killed and restarted, behind the client the server uses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine.client import EngineClient
from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineDeadError, EngineGoneError, RejectedError, StartupError
from engine.stream import MAX_RESUMPTIONS, RequestStream
from engine.supervisor import RestartPolicy, Supervisor
from scheduler.request import FinishReason, Request, SamplingParams
from tests.engine.workers import BUILDER, model
from tests.fakes import Script

QUICK = RestartPolicy(fast_death=30.0, max_fast_deaths=3, first_backoff=0.01)
FOREVER = 400  # tokens


def request(name: str, max_tokens: int = 8, **changes) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=7)
    return Request(name, (1, 2, 3, 4, 5), params, arrival=time.monotonic(), **changes)


def supervisor(name: str, policy: RestartPolicy = QUICK, drain_seconds: float = 5.0) -> Supervisor:
    config = EngineConfig(model=ModelConfig(model=name))
    return Supervisor(config, builder=BUILDER, policy=policy, drain_seconds=drain_seconds)


@contextlib.asynccontextmanager
async def running(name: str = "scripted", **options):
    link = supervisor(name, **options)
    link.spawn()
    client = EngineClient(link, heartbeat_seconds=1.0)
    try:
        await client.ready()
        yield client, link
    finally:
        await client.close()


async def tokens_of(client: EngineClient, wanted: Request) -> tuple[int, ...]:
    return tuple([token async for output in client.submit(wanted) for token in output.tokens])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_answers_over_the_wire():
    async with running() as (client, link):
        wanted = [request(f"r{i}", n=1 + i % 3) for i in range(8)]
        streams = [client.submit(each) for each in wanted]
        for each, stream in zip(wanted, streams, strict=True):
            finishes = [output.finish async for output in stream if output.finish]
            assert [finish.reason for finish in finishes] == [FinishReason.LENGTH] * each.n
            for choice, tokens in enumerate(stream.tokens):
                assert tuple(tokens) == Script().answer(each, choice)[0]
        assert client.facts.max_model_len == 512
        assert client.healthy
        assert client.load.running == 0
        pid = link.pid
    assert not alive(pid)


async def test_rejections_cross_the_wire():
    async with running() as (client, _):
        long = Request("long", (1,) * 600, SamplingParams(max_tokens=1), arrival=0.0)
        with pytest.raises(RejectedError) as error:
            await anext(client.submit(long))
        assert error.value.code == "context_length_exceeded"


async def exact(wanted: Request, stream) -> None:
    """The stream brings what an engine that never died would have sent, once."""
    seen: list[list[int]] = [[] for _ in range(wanted.n)]
    ends = 0
    async for output in stream:
        seen[output.choice] += output.tokens
        ends += output.finish is not None
        if output.finish is not None:
            assert output.finish.reason is FinishReason.LENGTH
            assert output.finish.completion_tokens == wanted.params.max_tokens
    assert [tuple(tokens) for tokens in seen] == [
        Script().answer(wanted, choice)[0] for choice in range(wanted.n)
    ]
    assert ends == wanted.n


async def test_killed_engine_is_replaced_and_every_stream_goes_on():
    async with running(model(step_seconds=0.005)) as (client, link):
        # More than there are slots: some of them have not begun.
        wanted = [request(f"r{i}", 60 + 5 * i, n=1 + i % 3) for i in range(20)]
        streams = [client.submit(each) for each in wanted]
        while not streams[0].tokens[0]:
            await asyncio.sleep(0.01)
        assert not any(streams[-1].tokens)
        first = link.pid
        os.kill(first, signal.SIGKILL)
        while client.serving:
            await asyncio.sleep(0.01)
        assert not client.healthy
        with pytest.raises(EngineDeadError):
            client.submit(request("between"))
        await client.ready()
        assert link.pid != first
        for each, stream in zip(wanted, streams, strict=True):
            await exact(each, stream)
            assert stream.resumptions == 1
        after = request("after")
        assert await tokens_of(client, after) == Script().answer(after)[0]
        assert client.load.running == client.load.waiting == 0


async def test_a_faulty_worker_costs_a_request_nothing_as_long_as_it_gets_on():
    async with running(model(raise_at=3)) as (client, _):
        wanted = request("r", 8)
        await exact(wanted, client.submit(wanted))


async def test_a_request_that_kills_every_engine_ends_and_others_live_on():
    assert RestartPolicy().max_fast_deaths > MAX_RESUMPTIONS + 1  # the deaths it causes
    policy = RestartPolicy(first_backoff=0.01)
    async with running(model(poison=49, step_seconds=0.005), policy=policy) as (client, _):
        poison = client.submit(replace(request("poison"), prompt=(1, 49, 2)))
        wanted = request("other", 100)
        other: RequestStream | None = None

        def join(resumed: Request) -> None:
            nonlocal other
            if other is None:  # it comes between two deaths
                asyncio.get_running_loop().call_soon(submit)

        def submit() -> None:
            nonlocal other
            other = client.submit(wanted)

        client.on_resume = join
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            [output async for output in poison]
        assert other is not None
        await exact(wanted, other)
        assert other.resumptions == MAX_RESUMPTIONS
        assert client.failure is None


async def test_gives_up_after_repeated_fast_deaths():
    async with running(model(kill_at=0)) as (client, _):
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await tokens_of(client, request("r"))
        failure = await asyncio.wait_for(client.gone(), 10)
        assert isinstance(failure, EngineGoneError)
        with pytest.raises(EngineGoneError, match="3 times"):
            await client.ready()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (model(refuse="the checkpoint is missing."), "^the checkpoint is missing.$"),
        (model(crash="boom"), "RuntimeError: boom"),
        (model(exit=3), "exit code 3"),
    ],
)
@pytest.mark.parametrize("ended_before", [False, True])
async def test_start_that_fails_is_one_sentence_and_not_repeated(name, sentence, ended_before):
    link = supervisor(name)
    link.spawn()
    pid = link.pid
    while ended_before and alive(pid):  # a quick failure, before anyone looked
        await asyncio.sleep(0.01)
    client = EngineClient(link)
    with pytest.raises(StartupError, match=sentence):
        await client.ready()
    assert link.pid == pid
    await client.close()


async def test_drain_finishes_what_runs_and_refuses_the_rest():
    async with running(model(step_seconds=0.005)) as (client, _):
        stream = client.submit(request("r", 40))
        await anext(stream)
        draining = asyncio.create_task(client.drain(10.0))
        await asyncio.sleep(0)
        with pytest.raises(RejectedError) as error:
            client.submit(request("late"))
        assert error.value.code == "draining"
        outputs = [output async for output in stream]
        assert outputs[-1].finish.reason is FinishReason.LENGTH
        await draining


async def test_drain_aborts_at_the_deadline():
    async with running(model(step_seconds=0.02)) as (client, _):
        stream = client.submit(request("r", FOREVER))
        await anext(stream)
        started = time.monotonic()
        await client.drain(0.2)
        assert time.monotonic() - started < 1.0
        outputs = [output async for output in stream]
        assert outputs[-1].finish.reason is FinishReason.ABORT


async def test_sigterm_to_the_engine_drains_it():
    async with running(model(step_seconds=0.005)) as (client, link):
        stream = client.submit(request("r", 40))
        await anext(stream)
        os.kill(link.pid, signal.SIGTERM)
        outputs = [output async for output in stream]
        assert outputs[-1].finish.reason is FinishReason.LENGTH


async def test_hung_step_turns_health_red():
    async with running(model(hang_at=2)) as (client, link):
        stream = client.submit(request("r", 50))
        await anext(stream)
        assert client.healthy
        await asyncio.sleep(1.2)
        assert not client.healthy
        os.kill(link.pid, signal.SIGKILL)
        while stream.resumptions == 0:
            await asyncio.sleep(0.01)
        assert client.healthy


async def test_idle_engine_burns_no_cpu():
    async with running() as (client, link):
        await tokens_of(client, request("warm"))
        ticks = cpu_ticks(link.pid)
        await asyncio.sleep(1.0)
        assert cpu_ticks(link.pid) - ticks <= 2  # of 100 a second


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_engine_does_not_outlive_its_supervisor(tmp_path):
    """Killed by force, the supervisor cannot clean up; the engine notices by itself."""
    script = """
import asyncio
from tests.engine.test_process import supervisor
async def main():
    link = supervisor("scripted")
    await link.connect(asyncio.get_running_loop().create_future())
    print(link.pid, link._folder, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        pid, folder = parent.stdout.readline().split()
        assert Path(folder.decode()).stat().st_mode & 0o777 == 0o700
        parent.kill()
    deadline = time.monotonic() + 5.0
    while alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(pid))
    assert not Path(folder.decode()).exists()
