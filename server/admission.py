"""Overload is answered before work starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from server.engine_face import Engine
from server.errors import overloaded, unavailable

RATE_WINDOW_SECONDS = 30.0


class Admission:
    """The gate in front of the engine: readiness, draining, a bounded queue."""

    def __init__(
        self, engine: Engine, *, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.draining = False
        self.in_flight = 0  # choices admitted here and not yet ended
        self._engine = engine
        self._max_waiting = max_waiting
        self._clock = clock
        self._finished = 0.0  # choices, decaying with RATE_WINDOW_SECONDS
        self._decayed_at = clock()

    @property
    def ready(self) -> bool:
        """Loaded, not draining, and the queue has room."""
        return self._engine.serving and not self.draining and self.waiting < self._max_waiting

    @property
    def waiting(self) -> int:
        """Choices without a slot: as the engine said last, or more if we sent it more since."""
        load = self._engine.load
        return max(load.waiting, self.in_flight - load.running)

    def check(self, choices: int = 1) -> None:
        """Raises `ApiError` 503 or 429 when a request of so many choices is not taken now."""
        if self.draining:
            raise unavailable("The server is shutting down.")
        if not self._engine.serving:
            raise unavailable("The model is loading.")
        waiting = self.waiting
        # Without a queue any number of choices is taken: to refuse them forever would be worse.
        if waiting >= self._max_waiting or (waiting and waiting + choices > self._max_waiting):
            raise overloaded(
                "The server is overloaded: its queue is full. Try again later.", self.retry_after()
            )

    def retry_after(self) -> float:
        """Seconds until a tenth of the queue should have been served, at the recent rate."""
        self._decay()
        rate = self._finished / RATE_WINDOW_SECONDS
        return max(1.0, 0.1 * self.waiting / rate) if rate > 0 else 5.0

    def enter(self, choices: int) -> None:
        self.in_flight += choices

    def leave(self, choices: int) -> None:
        self.in_flight -= choices
        self._decay()
        self._finished += choices

    def _decay(self) -> None:
        now = self._clock()
        self._finished *= math.exp((self._decayed_at - now) / RATE_WINDOW_SECONDS)
        self._decayed_at = now
