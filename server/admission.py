"""Overload is answered before work starts."""

from __future__ import annotations

from scheduler.request import Refusal
from server.engine_face import Engine
from server.errors import MIN_RETRY_AFTER_SECONDS, overloaded, unavailable


class Admission:
    """The gate in front of the engine: readiness, draining, a bounded queue."""

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self.draining = False
        self.in_flight = 0  # choices admitted here and not yet ended
        self._engine = engine
        self._max_waiting = max_waiting

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
            # Room comes as the queue moves: an equal share of the wait for each in it.
            seconds = self._engine.load.predicted_wait * choices / waiting
            raise overloaded(
                "its queue is full", max(seconds, MIN_RETRY_AFTER_SECONDS), Refusal.QUEUE_FULL
            )

    def enter(self, choices: int) -> None:
        self.in_flight += choices

    def leave(self, choices: int) -> None:
        self.in_flight -= choices
