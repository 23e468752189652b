"""The end of a server: drained, in order, by a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import httpx

from server.app import create_app
from server.run import run
from tests.server.helpers import REPLY, TEXT, chat, config, reply_engine
from tests.server.live import until

PATH = "/v1/chat/completions"


async def started(engine, **server):
    listener = socket.create_server(("127.0.0.1", 0))
    cfg = config(**server)
    task = asyncio.create_task(run(create_app(engine, TEXT, cfg), cfg.server, listener))
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    while True:
        try:
            await client.get("/health")
        except httpx.TransportError:
            await asyncio.sleep(0.01)
        else:
            return task, client


async def test_a_signal_drains() -> None:
    engine = reply_engine(delay=0.01)
    task, client = await started(engine)
    running = asyncio.create_task(client.post(PATH, json=chat()))
    await until(lambda: engine.requests)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert (await client.get("/ready")).status_code == 503
    assert (await client.post(PATH, json=chat())).status_code == 503
    assert (await running).json()["choices"][0]["message"]["content"] == REPLY
    await asyncio.wait_for(task, 5)
    await client.aclose()


async def test_what_outlives_the_deadline_ends_with_an_error() -> None:
    engine = reply_engine(stall_after=3)
    task, client = await started(engine, drain_seconds=0.1)
    running = asyncio.create_task(client.post(PATH, json=chat(stream=True)))
    await until(lambda: engine.running)
    os.kill(os.getpid(), signal.SIGTERM)
    content = (await running).content
    assert b'"error"' in content
    assert b"[DONE]" not in content
    await asyncio.wait_for(task, 5)
    await client.aclose()


async def test_a_second_signal_does_not_wait() -> None:
    engine = reply_engine(stall_after=3)
    task, client = await started(engine, drain_seconds=60)
    running = asyncio.create_task(client.post(PATH, json=chat(stream=True)))
    await until(lambda: engine.running)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 5)
    assert not running.done()
    running.cancel()
    await client.aclose()
