"""The API process of `foresight serve`: uvicorn around the app, from loading to drained."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from cli.checkpoint import text_folder
from cli.errors import CommandError
from engine.client import EngineClient
from engine.config import Config, ServerConfig
from engine.errors import StartupError
from engine.supervisor import Supervisor
from server.app import create_app
from text.assets import TextAssets, load_text
from text.chat_template import TemplateError
from text.tokenizer import TokenizerError

log = logging.getLogger(__name__)

# Longer than clients keep idle connections, so that none is closed under a request.
KEEP_ALIVE_SECONDS = 75
# What finished answers may take to reach their clients when the server ends.
FLUSH_SECONDS = 5


def serve(config: Config, supervisor: Supervisor, listener: socket.socket, started: float) -> int:
    """Runs until SIGTERM or SIGINT, or until the engine is gone for good (exit code 1).

    Raises `CommandError` for whatever prevents the start.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        return uvloop.run(_serve(config, supervisor, listener, started))
    except StartupError as error:
        raise CommandError(str(error)) from error


async def _serve(
    config: Config, supervisor: Supervisor, listener: socket.socket, started: float
) -> int:
    client = EngineClient(supervisor, heartbeat_seconds=config.server.heartbeat_seconds)
    await client.start()
    try:
        app = create_app(client, await _text(config, client), config)
        server = _uvicorn(app, config.server)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        stop, hurry = _watch_signals()
        try:
            if await _first(client.ready(), stop.wait(), serving) and not stop.is_set():
                _announce(app, config, listener, time.monotonic() - started)
                gc.collect()
                gc.freeze()
                await _first(client.gone(), stop.wait(), serving)
            app.state.services.admission.draining = True
            if stop.is_set():
                log.info("draining")
                await _first(client.drain(config.server.drain_seconds), hurry.wait())
        finally:
            server.should_exit = True
            server.force_exit = hurry.is_set()
            await serving
        return 0 if stop.is_set() else 1
    except OSError as error:  # the key file, the certificate
        raise CommandError(f"cannot start: {error}.") from error
    finally:
        await client.close()


async def _text(config: Config, client: EngineClient) -> TextAssets:
    """The tokenizer and the template.

    When they cannot be loaded the whole checkpoint may be at fault, of which the engine knows more,
    so it is heard first. Raises `StartupError` or `CommandError`.
    """
    model = config.engine.model
    template = Path(model.chat_template) if model.chat_template else None
    try:
        folder = text_folder(model.tokenizer or model.model, model.revision)
        return load_text(folder, template)
    except (TokenizerError, TemplateError, OSError, CommandError) as error:
        await client.ready()
        raise CommandError(str(error)) from error


def _uvicorn(app: FastAPI, server: ServerConfig) -> uvicorn.Server:
    settings = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=4096,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        ssl_certfile=server.tls_certificate,
        ssl_keyfile=server.tls_key,
    )
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        raise CommandError(
            f"the certificate {server.tls_certificate} or its key cannot be used: {error}."
        ) from error
    return uvicorn.Server(settings)


def _watch_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """The first SIGTERM or SIGINT sets the first event, the next one the second.

    Installed after uvicorn's own handlers, which would stop listening at once: while it drains, the
    server still answers, with 503.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    return stop, hurry


async def _first(*awaitables: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> Any:
    """The result of whichever ends first, or its exception; the coroutines among the rest are
    cancelled."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, awaitable in zip(tasks, awaitables, strict=True):
        if task not in done and asyncio.iscoroutine(awaitable):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    return next(task for task in tasks if task in done).result()


def _announce(app: FastAPI, config: Config, listener: socket.socket, seconds: float) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if config.server.tls_certificate else "http"
    base = f"{scheme}://{shown}:{port}{config.server.root_path}/v1"
    key = "a key of yours" if app.state.services.keys.required else "none"
    print(
        f"  {'ready':<32}{seconds:6.2f} s\n\n"
        f"Serving {', '.join(app.state.services.names)}\n\n"
        "  from openai import OpenAI\n"
        f'  client = OpenAI(base_url="{base}", api_key="{key}")\n',
        flush=True,
    )
