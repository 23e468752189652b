"""The API process of `foresight serve`: the app around the engine, from loading to drained."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop
from fastapi import FastAPI

from cli.checkpoint import text_folder
from cli.errors import CommandError
from engine.client import EngineClient
from engine.config import Config
from engine.errors import StartupError
from engine.supervisor import Supervisor
from server.app import create_app
from server.run import run
from text.assets import TextAssets, load_text
from text.chat_template import TemplateError
from text.tokenizer import TokenizerError

YIELDING = 10  # by so much the front end's niceness grows; 19 is the highest


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
        # It answers 503 until the engine is ready, and ends by a signal.
        running = asyncio.create_task(run(app, config.server, listener))
        try:
            await _first(client.ready(), running)
        except StartupError:
            logging.disable()  # the one sentence says it; how the parts end is of no interest
            running.cancel()
            await asyncio.wait([running])
            raise
        if not running.done():
            facts = client.facts
            if facts is not None and facts.device == "cpu":
                yield_cores()
            _announce(app, config, listener, time.monotonic() - started)
            gc.collect()
            gc.freeze()  # what lives now lives on: later collections need not look at it
            await _first(client.gone(), running)
        if not running.done():  # no engine, no server: end it as an operator would
            signal.raise_signal(signal.SIGTERM)
        await running
        return 0 if client.failure is None else 1
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


def yield_cores() -> None:
    """Lowers the priority of the calling thread, on Linux.

    The threads that compute a step together wait for each other, so one that is pushed off its core
    by this process stops them all. This one can wait for the next moment in which a core has
    nothing to compute: there are many in a step.
    """
    if sys.platform == "linux":  # elsewhere it would be the whole process's
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, min(niceness + YIELDING, 19))


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
