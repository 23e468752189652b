"""The engine as the front end sees it. `engine.client.EngineClient` has this shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.messages import EngineFacts, Step
from scheduler.request import FinishReason, Load, Output, Request


class RequestStream(Protocol):
    """What one submitted request brings, all its choices together."""

    @property
    def resumptions(self) -> int:
        """How often it went on in another engine after its own had died."""
        ...

    async def arrival(self) -> None:
        """Wait until `batch` need not wait; raises what it would. Loses nothing when cancelled."""
        ...

    async def batch(self) -> list[Output]:
        """Wait for at least one output and return everything queued, in order; `[]` once every
        choice has finished. Raises `RejectedError` or `EngineDeadError`."""
        ...

    def close(self) -> None:
        """Abort what has not finished. Idempotent; returns at once."""
        ...


class Engine(Protocol):
    """One engine replica."""

    # Set by the front end: called for every message of the engine, and for every request that goes
    # on in another one.
    on_step: Callable[[Step], None]
    on_resume: Callable[[Request], None]

    @property
    def facts(self) -> EngineFacts | None:
        """None until the engine is ready."""
        ...

    @property
    def serving(self) -> bool:
        """Takes requests now."""
        ...

    @property
    def load(self) -> Load: ...

    @property
    def healthy(self) -> bool:
        """The engine lives and, while work is queued, makes progress."""
        ...

    def submit(self, request: Request) -> RequestStream:
        """Hand over a request; returns at once. May raise `RejectedError` or `EngineDeadError`."""
        ...

    def abort(
        self,
        request_id: str,
        choice: int | None = None,
        reason: FinishReason = FinishReason.ABORT,
        tokens_kept: int | None = None,
    ) -> None:
        """End a request or one choice of it. Idempotent, fire and forget; the choice's `Finish`
        still arrives."""
        ...

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; return when the running ones have ended, after `seconds` by
        force."""
        ...
