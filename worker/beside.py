"""`Beside`: a second executor, for drafting while the target verifies."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class Beside:
    """Runs one piece of work at a time on a thread of its own, beside the worker's.

    On a CPU it takes one of the worker's threads, which computes with the others meanwhile. On a
    GPU it has a stream of its own. (That has not run on hardware.)
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="beside",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: Future[float] | None = None
        self._threads = 0  # that the worker's thread gets back

    @staticmethod
    def possible(device: torch.device) -> bool:
        """On a CPU it takes two threads."""
        return device.type == "cuda" or torch.get_num_threads() > 1

    @property
    def slowdown(self) -> float:
        """How many times as long the worker's thread is expected to take beside it."""
        if self._stream is not None:
            return 1.0
        threads = torch.get_num_threads()
        return threads / max(threads - 1, 1)

    @property
    def busy(self) -> bool:
        """Something was started and not waited for."""
        return self._running is not None

    def start(self, work: Callable[[], None]) -> None:
        """Called on the worker's thread, as `wait` is; what that has done is seen by the work."""
        assert self._running is None
        stream = self._stream
        if stream is None:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(max(self._threads - 1, 1))
        else:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

        def run() -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                if stream is None:
                    work()
                else:
                    with torch.cuda.stream(stream):
                        work()
            return time.perf_counter() - started

        self._running = self._pool.submit(run)

    def wait(self) -> tuple[float, float]:
        """Waits for the work and raises what it raised. Returns the seconds it took, and those that
        were waited."""
        running, self._running = self._running, None
        assert running is not None
        started = time.perf_counter()
        try:
            took = running.result()
        finally:
            if self._stream is None:
                torch.set_num_threads(self._threads)
            else:
                torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return took, time.perf_counter() - started

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
