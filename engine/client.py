"""`EngineClient`: the engine as the API process sees it. Asyncio; no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

from engine.errors import EngineDeadError, EngineGoneError, RejectedError, StartupError
from engine.messages import (
    Abort,
    Dead,
    Drain,
    EngineFacts,
    FromEngine,
    Hello,
    Ready,
    Rejected,
    Step,
    Submit,
)
from engine.stream import RequestStream
from engine.transport import ClientTransport
from scheduler.request import FinishReason, Load, Request

log = logging.getLogger(__name__)

NOT_READY = "the engine is not ready"
DRAINING = "the server is shutting down"
# After the drain deadline the engine still has to say which requests it aborted.
DRAIN_MARGIN = 1.0


class EngineLink(Protocol):
    """How a client comes by an engine, and by the next one when it dies."""

    async def connect(self, lost: asyncio.Future[str]) -> ClientTransport:
        """Waits for an engine that serves; `lost` resolves with the reason when it is gone.

        Raises `StartupError` or `EngineGoneError` when there will be none.
        """
        ...

    async def close(self) -> None: ...


class EngineClient:
    """Submits requests and hands out what comes back.

    When the engine dies every open stream ends with `EngineDeadError`, and the link is asked for
    the next engine; until that is ready, `submit` raises.
    """

    def __init__(
        self,
        link: EngineLink,
        *,
        heartbeat_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.load = Load()
        self.on_step: Callable[[Step], None] = lambda step: None  # for metrics
        self._link = link
        self._heartbeat_seconds = heartbeat_seconds
        self._clock = clock
        self._transport: ClientTransport | None = None
        self._facts: EngineFacts | None = None
        self._up = asyncio.Event()
        self._streams: dict[str, RequestStream] = {}
        self._progress_at = clock()
        self._draining = False
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    # -- life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to connect; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="engine-client")

    async def ready(self) -> EngineFacts:
        """Waits for the engine to serve. Raises `StartupError` or `EngineGoneError`."""
        await self.start()
        assert self._task is not None
        up = asyncio.create_task(self._up.wait())
        try:
            await asyncio.wait((up, self._task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if self._failure is not None:
            raise self._failure
        assert self._facts is not None
        return self._facts

    async def gone(self) -> Exception | None:
        """Returns when no engine will serve any more: the reason, None after `close`."""
        await self.start()
        assert self._task is not None
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(self._task)
        return self._failure

    async def drain(self, seconds: float) -> None:
        """Refuses new requests and returns when the running ones have ended.

        Those unfinished after `seconds` are aborted by the engine.
        """
        self._draining = True
        if self._transport is not None:
            self._transport.send(Drain(seconds))
        deadline = self._clock() + seconds + DRAIN_MARGIN
        while self._streams and self._clock() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Ends the engine and every stream."""
        self._draining = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._detach(DRAINING)
        await self._link.close()

    # -- state ------------------------------------------------------------------------------

    @property
    def facts(self) -> EngineFacts | None:
        """None before an engine was ready for the first time."""
        return self._facts

    @property
    def failure(self) -> Exception | None:
        """Why no engine will serve any more; None while one does or may."""
        return self._failure

    @property
    def serving(self) -> bool:
        """Takes requests now."""
        return self._up.is_set() and not self._draining

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def healthy(self) -> bool:
        """An engine is there, and it settles steps while requests are unfinished."""
        if self._failure is not None or not self._up.is_set():
            return False
        return self.stalled_seconds < self._heartbeat_seconds

    @property
    def stalled_seconds(self) -> float:
        """How long unfinished requests have seen no settled step; 0 without any."""
        return self._clock() - self._progress_at if self._streams else 0.0

    # -- requests ---------------------------------------------------------------------------

    def submit(self, request: Request) -> RequestStream:
        """Sends a request. Its id must be unlike that of any unfinished one.

        Raises `RejectedError` while draining and `EngineDeadError` while there is no engine. A
        rejection by the engine itself is raised by the stream.
        """
        if self._draining:
            raise RejectedError("draining", DRAINING)
        if self._transport is None or not self._up.is_set():
            raise EngineDeadError(NOT_READY)
        if request.id in self._streams:
            raise ValueError(f"request id {request.id!r} is already in use")
        if not self._streams:
            self._progress_at = self._clock()
        stream = RequestStream(request, lambda: self.abort(request.id))
        self._streams[request.id] = stream
        self._transport.send(Submit(request))
        return stream

    def abort(
        self,
        request_id: str,
        choice: int | None = None,
        reason: FinishReason = FinishReason.ABORT,
        tokens_kept: int | None = None,
    ) -> None:
        """Fire and forget; an ended request is ignored."""
        if self._transport is not None and request_id in self._streams:
            self._transport.send(Abort(request_id, choice, reason, tokens_kept))

    # -- the engine's side ------------------------------------------------------------------

    async def _run(self) -> None:
        """Connects, waits for the engine's death, connects again."""
        try:
            while True:
                lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
                self._transport = await self._link.connect(lost)
                self._transport.listen(self._receive)
                self._transport.send(Hello())
                reason = await lost
                self._detach(reason)
                if self._draining:
                    return
                log.error("%s; %s", reason, "asking for another engine")
        except (StartupError, EngineGoneError) as error:
            self._failure = error
            self._detach(str(error))

    def _detach(self, reason: str) -> None:
        self._up.clear()
        self.load = Load()
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDeadError(reason))

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Step(outputs, load):
                self._progress_at = self._clock()
                self.load = load
                for output in outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is None:
                        continue
                    stream.put(output)
                    if stream.finished:
                        del self._streams[output.request_id]
                self.on_step(message)
            case Rejected(request_id, code, text, retry_after):
                rejected = self._streams.pop(request_id, None)
                if rejected is not None:
                    rejected.fail(RejectedError(code, text, retry_after))
            case Ready(facts, load):
                self._facts = facts
                self.load = load
                self._progress_at = self._clock()
                self._up.set()
            case Dead(text):
                log.error("%s", text)
                self._detach(text)
