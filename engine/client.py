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
    ToEngine,
)
from engine.stream import MAX_RESUMPTIONS, RequestStream
from engine.transport import ClientTransport
from scheduler.request import FinishReason, Load, Output, Request

log = logging.getLogger(__name__)

NOT_READY = "the engine is not ready"
DRAINING = "the server is shutting down"
OTHER_ENGINE = "the engine that came after it computes otherwise"
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

    When the engine dies the link is asked for the next one; until that is ready, `submit` raises.
    Open streams go on in the next engine, with the same text. `EngineDeadError` ends those that
    cannot: when there is no next engine or it computes otherwise, or when it would be one more
    than `MAX_RESUMPTIONS` for that request.

        submit ──▶ open ──▶ finished               in an engine
                  │    ▲
              _lose    _resume
                  ▼    │
                 waiting ──▶ finished              without: time limits, aborts, no engine any more
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
        self.on_resume: Callable[[Request], None] = lambda request: None  # for metrics
        self._link = link
        self._heartbeat_seconds = heartbeat_seconds
        self._clock = clock
        self._transport: ClientTransport | None = None
        self._facts: EngineFacts | None = None
        self._up = asyncio.Event()
        self._streams: dict[str, RequestStream] = {}
        self._progress_at = clock()
        self._drain_until: float | None = None
        self._expiry: asyncio.Task[None] | None = None  # keeps time limits while there is no engine
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

        Those unfinished after `seconds` are aborted by the engine; where there is none, or it does
        not say so, they end with `EngineDeadError`.
        """
        self._drain_until = self._clock() + seconds
        if self._up.is_set():
            self._send(Drain(seconds))
        while self._streams and self._clock() < self._drain_until + DRAIN_MARGIN:
            if not self._up.is_set() and self._clock() >= self._drain_until:
                break
            await asyncio.sleep(0.02)
        self._fail_all(DRAINING)

    async def close(self) -> None:
        """Ends the engine and every stream."""
        self._drain_until = self._clock()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._detach()
        self._fail_all(DRAINING)
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
        return self._up.is_set() and not self.draining

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

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
        if self.draining:
            raise RejectedError("draining", DRAINING)
        if not self._up.is_set():
            raise EngineDeadError(NOT_READY)
        if request.id in self._streams:
            raise ValueError(f"request id {request.id!r} is already in use")
        if not self._streams:
            self._progress_at = self._clock()
        stream = RequestStream(request, lambda: self.abort(request.id))
        self._streams[request.id] = stream
        self._send(Submit(request))
        return stream

    def abort(
        self,
        request_id: str,
        choice: int | None = None,
        reason: FinishReason = FinishReason.ABORT,
        tokens_kept: int | None = None,
    ) -> None:
        """Fire and forget; an ended request is ignored. Without an engine it ends at once."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        stream.ending(choice, reason, tokens_kept)
        if self._up.is_set():
            self._send(Abort(request_id, choice, reason, tokens_kept))
        else:
            stream.end_asked(self._clock())
            self._forget_finished()

    # -- the engine's side ------------------------------------------------------------------

    async def _run(self) -> None:
        """Connects, waits for the engine's death, connects again. Raises nothing."""
        try:
            while True:
                lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
                self._transport = await self._link.connect(lost)
                self._transport.listen(self._receive)
                self._transport.send(Hello())
                reason = await lost
                self._lose(reason)
                if self.draining and not self._streams:
                    return
                log.error("%s; asking for another engine", reason)
        except (StartupError, EngineGoneError) as error:
            self._failure = error
            self._detach()
            self._fail_all(str(error))

    def _send(self, message: ToEngine) -> None:
        assert self._transport is not None
        self._transport.send(message)

    def _detach(self) -> None:
        self._up.clear()
        self.load = Load()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _fail_all(self, reason: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDeadError(reason))
        self._keep_time(False)

    def _forget_finished(self) -> None:
        self._streams = {name: s for name, s in self._streams.items() if not s.finished}

    # -- from one engine to the next --------------------------------------------------------

    def _lose(self, reason: str) -> None:
        """The engine is gone. What it was asked to end has ended; the rest waits for the next."""
        self._detach()
        for stream in self._streams.values():
            stream.end_asked(self._clock())
            if stream.resumptions >= MAX_RESUMPTIONS:
                stream.fail(EngineDeadError(reason))
        self._forget_finished()
        self._keep_time(True)

    def _resume(self, before: EngineFacts, facts: EngineFacts) -> None:
        """Hands every stream to the engine that is ready, in the order they first came."""
        self._keep_time(False)
        for stream in self._streams.values():
            if not facts.continues(before, stream.request):
                stream.fail(EngineDeadError(OTHER_ENGINE))
                continue
            stream.resumptions += 1
            age = self._clock() - stream.request.arrival
            self._send(Submit(stream.continuation, age))
            self.on_resume(stream.request)
        self._forget_finished()
        if self._streams:
            log.warning("%d requests go on in another engine", len(self._streams))
        if self._drain_until is not None:
            self._send(Drain(max(self._drain_until - self._clock(), 0.0)))

    def _keep_time(self, keep: bool) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if keep and self._streams:
            self._expiry = asyncio.create_task(self._expire(), name="engine-client-time-limits")

    async def _expire(self) -> None:
        """Ends streams whose time limits pass while there is no engine to do it."""
        while limits := [e[0] for s in self._streams.values() if (e := s.expires)]:
            await asyncio.sleep(min(limits) - self._clock())
            now = self._clock()
            for stream in self._streams.values():
                if (expires := stream.expires) is not None and expires[0] <= now:
                    _, reason, message = expires
                    stream.end(reason, message, now)
            self._forget_finished()

    def _begun(self, output: Output) -> bool:
        """Whether its choice had tokens before. Who waits for its first is told first: writing to
        the others takes a while."""
        stream = self._streams.get(output.request_id)
        return stream is not None and bool(stream.tokens[output.choice])

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Step(outputs, load):
                self._progress_at = self._clock()
                self.load = load
                for output in sorted(outputs, key=self._begun):
                    stream = self._streams.get(output.request_id)
                    if stream is None:
                        continue
                    stream.put(output)
                    if stream.finished:
                        del self._streams[output.request_id]
                self.on_step(message)
            case Rejected(request_id, code, text, retry_after):
                rejected = self._streams.pop(request_id, None)
                if rejected is None:
                    return
                if rejected.resumptions:  # it was taken once: this is no answer to its client
                    rejected.fail(EngineDeadError(text))
                else:
                    rejected.fail(RejectedError(code, text, retry_after))
            case Ready(facts, load):
                before, self._facts = self._facts or facts, facts
                self.load = load
                self._progress_at = self._clock()
                self._resume(before, facts)
                self._up.set()
            case Dead(text):
                log.error("%s", text)
                self._lose(text)
