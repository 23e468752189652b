"""`RequestStream`: what one request brings, as the API process sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from scheduler.request import Finish, FinishReason, Output, Request

# So often is a request handed to another engine after its own has died. A request that kills every
# engine ends then, before the supervisor gives up for all.
MAX_RESUMPTIONS = 2
# A consumer that leaves so many tokens unread is ended: memory is bounded, and what nobody reads
# need not be computed.
MAX_UNREAD_TOKENS = 16_384
TOO_SLOW = "the client reads too slowly"


class RequestStream(AsyncIterator[Output]):
    """The outputs of all choices of one request, in order; ends after the last choice's finish.

    It outlives the engine: the client hands `continuation` to the next one, and the consumer sees
    nothing but a pause. Iterating raises `RejectedError` or `EngineDeadError` after what arrived
    before. The consumer is woken once per engine message; when it is behind, outputs of one choice
    are merged. As a context manager it aborts what is unfinished when it is left.
    """

    def __init__(self, request: Request, abort: Callable[[], None]) -> None:
        self.request = request
        self.resumptions = 0  # engines that took it over from one that died
        # Committed tokens by choice: with the request, all that continuing elsewhere needs.
        self.tokens = [list(tokens or ()) for tokens in request.produced or ((),) * request.n]
        self._demoted = [0] * request.n  # positions, by choice, by any engine
        self._abort = abort
        # What the engine was asked to end and has not ended yet: by choice, why and at how many
        # tokens.
        self._ending: dict[int, tuple[FinishReason, int | None]] = {}
        self._unfinished = set(request.open_choices)
        self._arrived: list[Output] = []
        self._unread_tokens = 0
        self._ready: deque[Output] = deque()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        """No more outputs will arrive; some may still be unread."""
        return not self._unfinished or self._error is not None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        if not self._ready:
            self._ready.extend(await self.batch())
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def arrival(self) -> None:
        """Waits until `batch` need not wait: something is unread, or nothing more will come.

        Nothing is lost where the wait is cancelled. Raises `RejectedError` or `EngineDeadError`.
        """
        while not self._arrived and self._unfinished and self._error is None:
            await self._wait()
        if not self._arrived and self._error is not None:
            raise self._error

    async def batch(self) -> list[Output]:
        """Waits until something is unread and returns all of it, one output per choice.

        `[]` after the last choice's finish. Raises `RejectedError` or `EngineDeadError`.
        """
        if not self._arrived:
            await self.arrival()
        arrived, self._arrived = self._arrived, []
        self._unread_tokens = 0
        return merged(arrived)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Aborts what is unfinished. Idempotent."""
        if not self.finished:
            self._abort()

    def put(self, output: Output) -> None:
        """Takes one output in. Called by the client for each that arrives."""
        if output.choice not in self._unfinished or self._error is not None:
            return
        if output.demoted > self._demoted[output.choice]:
            self._demoted[output.choice] = output.demoted
        if output.finish is not None:
            self._unfinished.discard(output.choice)
            demoted = max(output.finish.demoted, self._demoted[output.choice])
            if self.resumptions or demoted:
                output.finish = replace(
                    output.finish, resumptions=self.resumptions, demoted=demoted
                )
        self.tokens[output.choice].extend(output.tokens)
        self._arrived.append(output)
        self._unread_tokens += len(output.tokens)
        if self._unread_tokens > MAX_UNREAD_TOKENS and self._unfinished:
            self._end_slow_reader()
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error, unless it has ended."""
        if not self.finished:
            self._error = error
            self._wake()

    # -- between two engines ----------------------------------------------------------------

    @property
    def expires(self) -> tuple[float, FinishReason, str] | None:
        """When its next time limit passes, on the clock of its arrival, and the end that means.

        The time in the queue is over once anything came.
        """
        request = self.request
        limits = []
        if request.deadline is not None:
            limits.append((request.deadline, FinishReason.TIMEOUT, "deadline exceeded"))
        if request.queue_deadline is not None and not self._begun:
            message = "waited too long in the queue"
            limits.append((request.queue_deadline, FinishReason.QUEUE_TIMEOUT, message))
        return min(limits, default=None)

    @property
    def continuation(self) -> Request:
        """The request as the next engine gets it."""
        request = self.request
        return replace(
            request,
            produced=tuple(
                tuple(tokens) if choice in self._unfinished else None
                for choice, tokens in enumerate(self.tokens)
            ),
            queue_deadline=None if self._begun else request.queue_deadline,
        )

    def ending(self, choice: int | None, reason: FinishReason, tokens_kept: int | None) -> None:
        """The engine was asked to end one choice, or all."""
        for number in self._unfinished if choice is None else (choice,):
            self._ending.setdefault(number, (reason, tokens_kept))

    def end_asked(self, now: float) -> None:
        """Ends what the engine was asked to end: there is no engine that would say so."""
        for choice, (reason, tokens_kept) in self._ending.items():
            self._end(choice, reason, now, tokens_kept=tokens_kept)

    def end(self, reason: FinishReason, message: str, now: float) -> None:
        """Ends every choice, as an engine would."""
        for choice in sorted(self._unfinished):
            self._end(choice, reason, now, message)

    @property
    def _begun(self) -> bool:
        return any(self.tokens) or len(self._unfinished) < self.request.n

    def _end(
        self,
        choice: int,
        reason: FinishReason,
        now: float,
        message: str = "",
        tokens_kept: int | None = None,
    ) -> None:
        finish = Finish(
            reason,
            message=message,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=len(self.tokens[choice]) if tokens_kept is None else tokens_kept,
            arrival=self.request.arrival,
            finished=now,
        )
        self.put(Output(self.request.id, choice, finish=finish))

    def _end_slow_reader(self) -> None:
        self._abort()
        self._unread_tokens = 0  # or the ends below would come here again
        self.end(FinishReason.ERROR, TOO_SLOW, self.request.arrival)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merged(outputs: list[Output]) -> list[Output]:
    """One output per choice, in order of first appearance."""
    if len(outputs) == 1:
        return outputs
    by_choice: dict[int, list[Output]] = {}
    for output in outputs:
        by_choice.setdefault(output.choice, []).append(output)
    return [_joined(group) for group in by_choice.values()]


def _joined(group: list[Output]) -> Output:
    if len(group) == 1:
        return group[0]
    return Output(
        group[0].request_id,
        group[0].choice,
        tokens=tuple(token for output in group for token in output.tokens),
        logprobs=tuple(entry for output in group for entry in output.logprobs),
        prompt_logprobs=group[0].prompt_logprobs,
        finish=group[-1].finish,
        demoted=group[-1].demoted,
    )
