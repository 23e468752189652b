"""Where steps run, so that launching one returns at once.

ThreadExecutor, for a CPU: a step is computed and read before the next one begins.

    thread   [ step 1 ......... ][ step 2 ......... ][ step 3 ...
    told                            step 1               step 2

StreamExecutor, for a GPU: a step begins when it is launched, and is read when it is done.

    thread   begin 1  begin 2  read 1  begin 3  read 2 ...
    stream           [ step 1 .... ][ step 2 .... ][ step 3 ...
    waiter            waiting for 1   for 2          for 3
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from scheduler.plan import StepResult

PATIENCE = 2e-3  # seconds for which a launch waits at most


class Begun(Protocol):
    """A step all of whose work has been given to the device."""

    def wait(self) -> None:
        """Blocks until the device is through with it. From any thread."""
        ...

    def read(self) -> StepResult:
        """Once it is. On the executor's thread, like all that touches the worker's state."""
        ...


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


class Executor(Protocol):
    """Runs steps in the order of their launch."""

    def submit(self, begin: Callable[[], Begun]) -> PendingStep: ...

    def call(self, function: Callable[[], None]) -> None:
        """Runs `function` on the executor's thread, after the steps launched so far have begun."""
        ...

    def computes(self) -> None:
        """A step says, on the executor's thread, that it needs the interpreter no more for a
        while."""
        ...

    def close(self) -> None: ...


class ThreadExecutor:
    """Runs steps in order on one thread of its own.

    On a CPU that thread stands for the device's stream: while it computes step N + 1, the engine's
    thread settles and publishes step N. So the end of step N is told when N + 1 computes, if that
    is waiting already: told before, both threads would want the interpreter, and the step would
    begin when the other one is through. For the same reason a launch that finds the thread idle
    returns when the step computes. Torch's thread count is a property of the calling thread,
    so it is set inside.
    """

    def __init__(self, threads: int) -> None:
        self._launched = self._ended = 0
        self._untold: deque[tuple[Future[StepResult], StepResult]] = deque()
        self._computing = threading.Event()  # a step, or none is left
        self._pool = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="worker",
            initializer=torch.set_num_threads,
            initargs=(threads,),
        )

    def submit(self, begin: Callable[[], Begun]) -> PendingStep:
        pending: Future[StepResult] = Future()
        idle = self._ended == self._launched
        self._computing.clear()
        self._launched += 1
        self._pool.submit(self._run, begin, pending)
        if idle:
            self._computing.wait(PATIENCE)
        return PendingStep(pending)

    def _run(self, begin: Callable[[], Begun], pending: Future[StepResult]) -> None:
        try:
            result = begin().read()
        except BaseException as error:
            self.computes()
            pending.set_exception(error)
            return
        finally:
            self._ended += 1
        self._untold.append((pending, result))
        if self._ended >= self._launched:
            self.computes()

    def call(self, function: Callable[[], None]) -> None:
        self._pool.submit(function).result()

    def computes(self) -> None:
        while self._untold:
            pending, result = self._untold.popleft()
            pending.set_result(result)
        self._computing.set()

    def close(self) -> None:
        self._pool.shutdown(wait=True)


class StreamExecutor:
    """Begins steps as they are launched; the device computes them in the order of its stream.

    One thread owns the worker's state: it begins steps and reads their results. A second one does
    nothing but wait for the device, so that beginning step N + 1 never waits for the end of step
    N. Everything goes to the default stream, which orders the work of both and of whoever prepared
    the model.
    """

    def __init__(
        self, threads: int, device: torch.device | None = None, core: int | None = None
    ) -> None:
        """device: the CUDA device of the threads. core: the CPU that the first is pinned to."""

        def prepare() -> None:
            torch.set_num_threads(threads)
            if device is not None and device.index is not None:
                torch.cuda.set_device(device)
            if core is not None:
                os.sched_setaffinity(0, {core})  # of this thread alone

        self._pool = ThreadPoolExecutor(1, "worker", prepare)
        self._waiter = ThreadPoolExecutor(1, "waiter")

    def submit(self, begin: Callable[[], Begun]) -> PendingStep:
        pending: Future[StepResult] = Future()

        def start() -> None:
            step = begin()
            self._waiter.submit(guarded, lambda: wait(step))

        def wait(step: Begun) -> None:
            step.wait()
            self._pool.submit(guarded, lambda: pending.set_result(step.read()))

        def guarded(stage: Callable[[], None]) -> None:
            try:
                stage()
            except BaseException as error:
                pending.set_exception(error)

        self._pool.submit(guarded, start)
        return PendingStep(pending)

    def call(self, function: Callable[[], None]) -> None:
        self._pool.submit(function).result()

    def computes(self) -> None:
        pass  # the device does, beside this thread

    def close(self) -> None:
        self.call(lambda: None)  # whatever was launched has begun
        self._waiter.shutdown(wait=True)
        self._pool.shutdown(wait=True)
