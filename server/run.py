"""Runs an app over HTTP, and ends it in order.

On the first SIGTERM or SIGINT: `/ready` turns red and new requests get 503, while running ones go
on; when they have ended, or the drain deadline has ended them, connections are closed and `run`
returns. A second signal skips the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from engine.config import ServerConfig
from server.services import Services

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048  # clients give up on a connection after 5 s; accepting is cheap
# Idle connections stay open longer than clients keep theirs, so that none is closed while a client
# is about to use it again.
KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    """Leaves signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(app: FastAPI, config: ServerConfig, listener: socket.socket) -> None:
    """Serve until a signal. Call it from the main thread, under uvloop where there is one."""
    services: Services = app.state.services
    server = _Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,  # `context.py` writes one line a request
            log_config=None,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            root_path=config.root_path,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
            timeout_graceful_shutdown=5,
        )
    )
    drain = _Drain(services, config.drain_seconds, server)
    loop = asyncio.get_running_loop()
    with _signals(loop, drain.signalled):
        await server.serve(sockets=[listener])


class _Drain:
    """Counts signals; the first starts the drain, the second ends it."""

    def __init__(self, services: Services, seconds: float, server: uvicorn.Server) -> None:
        self._services = services
        self._seconds = seconds
        self._server = server
        self._task: asyncio.Task[None] | None = None

    def signalled(self) -> None:
        if self._task is not None:
            log.warning("second signal: ending at once")
            self._server.config.timeout_graceful_shutdown = 0
            self._server.should_exit = True
            return
        log.info("draining: running requests get up to %g s", self._seconds)
        self._services.admission.draining = True
        self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._services.engine.drain(self._seconds)
        finally:
            self._server.should_exit = True


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, handler: Callable[[], None]) -> Iterator[None]:
    for number in SIGNALS:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
