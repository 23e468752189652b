"""A streamed answer as raw ASGI.

The body task writes; beside it one watcher waits for the client to leave and, when nothing was sent
for a while, sends a comment that keeps proxies from closing the connection. A stream ends in one of
three ways: `[DONE]`, an error event, or, if the client left, not at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.choice import Piece
from server.disconnect import disconnected
from server.errors import ApiError, internal
from server.generation import Generation

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
COMMENT = {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}
MIN_PAUSE_SECONDS = 0.005  # between looks at the clock
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Chunks(Protocol):
    """Writes one format's events."""

    def opening(self, generation: Generation) -> bytes: ...
    def piece(self, piece: Piece, generation: Generation) -> bytes: ...
    def closing(self, generation: Generation) -> bytes: ...


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How a stream ended: an HTTP-like status and, for errors, why; `reason` is for metrics."""

    status: int
    error: str = ""
    reason: str = ""


class EventStream(Response):
    """Streams one `Generation`. `on_end` is called once, whatever happens."""

    def __init__(
        self,
        generation: Generation,
        chunks: Chunks,
        *,
        keep_alive: float,
        headers: list[tuple[bytes, bytes]],
        on_end: Callable[[StreamEnd], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = [*HEADERS, *headers]
        self._generation = generation
        self._chunks = chunks
        self._keep_alive = keep_alive
        self._on_end = on_end
        self._left = False
        self._ending = False
        self._sending = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end = StreamEnd(499, "the client left")
        watcher: asyncio.Task[None] | None = None
        task = asyncio.current_task()
        assert task is not None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            watcher = asyncio.create_task(self._watch(receive, send, task))
            end = await self._write(send)
        except asyncio.CancelledError:
            if not self._left:
                raise
            task.uncancel()
        finally:
            if watcher is not None:
                watcher.cancel()
            self._generation.close()
            self._on_end(end)

    async def _write(self, send: Send) -> StreamEnd:
        """Write every event, to the end or to an error."""
        generation, chunks = self._generation, self._chunks
        try:
            body = chunks.opening(generation)
            if body:
                await self._send(send, body)
            while (pieces := await generation.pieces()) is not None:
                if len(pieces) == 1:
                    body = chunks.piece(pieces[0], generation)
                else:
                    body = b"".join([chunks.piece(piece, generation) for piece in pieces])
                if body:
                    await self._send(send, body)
            await self._send(send, chunks.closing(generation) + DONE, more=False)
            return StreamEnd(200)
        except ApiError as error:
            problem = error
        except Exception:
            log.exception("a stream failed")
            problem = internal()
        await self._send(send, b"data: " + problem.body() + b"\n\n", more=False)
        return StreamEnd(problem.status, problem.message, problem.reason or "")

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._sending, self._ending = True, not more
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending, self._sent_at = False, time.monotonic()

    async def _watch(self, receive: Receive, send: Send, writer: asyncio.Task[None]) -> None:
        """End the writer when the client leaves; meanwhile keep the connection alive."""
        leaving = asyncio.ensure_future(disconnected(receive))
        self._sent_at = time.monotonic()
        try:
            while True:
                rest = self._sent_at + self._keep_alive - time.monotonic()
                await asyncio.wait((leaving,), timeout=max(rest, MIN_PAUSE_SECONDS))
                if self._ending:  # after the last event the server reports a disconnect too
                    return
                if leaving.done():
                    self._left = True
                    writer.cancel()
                    return
                quiet = time.monotonic() - self._sent_at >= self._keep_alive
                if quiet and not self._sending:  # a client that does not read is not waiting
                    self._sent_at = time.monotonic()
                    await send(COMMENT)
        finally:
            leaving.cancel()
