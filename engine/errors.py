"""What can go wrong between an API process and an engine."""

from __future__ import annotations


class RejectedError(Exception):
    """The engine did not accept a request; nothing of it ran.

    `code` is a `Refusal`, or one of `context_length_exceeded`, `draining`, `invalid`;
    `retry_after` is in seconds, None when a retry cannot help or the time is unknown.
    """

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


class EngineDeadError(Exception):
    """The engine is gone and the request could not be carried over to a new one."""

    def __init__(self, message: str = "the engine stopped") -> None:
        super().__init__(message)
        self.message = message


class StartupError(Exception):
    """The engine cannot serve with this configuration. The message is one sentence for a person."""


class EngineGoneError(Exception):
    """The engine died again and again; it will not be started once more."""


class WorkerLostError(Exception):
    """No step can succeed any more. The message says why, for a person."""
