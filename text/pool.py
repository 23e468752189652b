"""A small thread pool with a bounded queue, for rendering and tokenizing off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# A text of so many characters is tokenized where it stands, in about half a millisecond: to wake a
# thread, and to take turns with it at the interpreter, costs as much and more where cores are busy.
SHORT = 2_000


class PoolFullError(Exception):
    """Too much text is already waiting to be tokenized."""


class TextPool:
    """Runs functions on `threads` threads; at most `limit` may be waiting or running."""

    def __init__(self, threads: int, limit: int = 1024) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._limit = limit
        self._pending = 0

    async def run(self, function: Callable[[], T], characters: int | None = None) -> T:
        """The function's result. Raises `PoolFullError` at once when the queue is full.

        `characters`: of the text it works on, where that is known; a short one needs no thread. A
        cancelled caller does not wait; the function, once started, runs to its end.
        """
        if characters is not None and characters <= SHORT:
            return function()
        if self._pending >= self._limit:
            raise PoolFullError
        future = self._executor.submit(function)
        self._pending += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._pending -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
