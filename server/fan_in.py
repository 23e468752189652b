"""Several request streams read as one: a completion with a list of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from scheduler.request import Output
from server.engine_face import RequestStream


class FanIn:
    """Has the face of a `RequestStream`. The first error of any stream is raised."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self._streams = streams
        self._queued: list[Output] = []
        self._arrived = asyncio.Event()
        self._error: BaseException | None = None
        self._open = len(streams)
        self._tasks = [asyncio.create_task(self._read(stream)) for stream in streams]

    @property
    def resumptions(self) -> int:
        """Of the stream that had the most."""
        return max(stream.resumptions for stream in self._streams)

    async def arrival(self) -> None:
        while not self._queued and self._open and self._error is None:
            self._arrived.clear()
            await self._arrived.wait()
        if not self._queued and self._error is not None:
            raise self._error

    async def batch(self) -> list[Output]:
        await self.arrival()
        queued, self._queued = self._queued, []
        return queued

    def close(self) -> None:
        """Stop reading; the streams are closed by their owner."""
        for task in self._tasks:
            task.cancel()

    async def _read(self, stream: RequestStream) -> None:
        try:
            while batch := await stream.batch():
                self._queued.extend(batch)
                self._arrived.set()
        except Exception as error:
            self._error = error
        finally:
            self._open -= 1
            self._arrived.set()
