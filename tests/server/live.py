"""A real server on a loopback socket, in this process, on a thread with its own event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
import uvloop

from engine.config import Config
from server.app import create_app
from tests.fakes_engine import ScriptedEngine
from tests.server.helpers import TEXT, config


@contextmanager
def serving(engine: ScriptedEngine, cfg: Config | None = None) -> Iterator[str]:
    """Yields the base URL."""
    app = create_app(engine, TEXT, cfg or config())
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(app, http="httptools", ws="none", access_log=False, log_config=None)
    server = uvicorn.Server(settings)

    async def run() -> None:
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: uvloop.run(run()), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5)
        assert not thread.is_alive()


async def until(condition, seconds: float = 2.0) -> None:
    """Wait for something to become true on another thread."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.005)
