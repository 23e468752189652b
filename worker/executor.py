"""Where steps run, so that launching one returns at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from scheduler.plan import StepResult


class PendingStep:
    """A launched step."""

    def __init__(self, future: Future[StepResult]) -> None:
        self._future = future

    def wait(self) -> StepResult:
        """Blocks until the step is done; raises what it raised."""
        return self._future.result()

    def done(self) -> bool:
        return self._future.done()

    def notify(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once the step is done, from whichever thread finishes it."""
        self._future.add_done_callback(lambda _: callback())


class ThreadExecutor:
    """Runs steps in order on one thread of its own.

    On a CPU that thread stands for the device's stream: while it computes step N + 1, the engine's
    thread settles and publishes step N. Torch's thread count is a property of the calling thread,
    so it is set inside.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="worker",
            initializer=torch.set_num_threads,
            initargs=(threads,),
        )

    def submit(self, run: Callable[[], StepResult]) -> PendingStep:
        return PendingStep(self._pool.submit(run))

    def call(self, function: Callable[[], None]) -> None:
        """Runs `function` on the executor's thread, after the steps launched so far."""
        self._pool.submit(function).result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
