"""One API request at work: its engine streams, its choices, its times and counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.errors import EngineDeadError, RejectedError
from scheduler.request import Finish, FinishReason, Output, Request, TokenLogprob
from server.choice import ChoiceText, Piece
from server.engine_face import Engine, RequestStream
from server.errors import ApiError, failed, from_engine, never_started, timed_out, unavailable
from server.fan_in import FanIn
from server.job import Job, Usage
from server.observe import Observer, timings
from text.tokenizer import Tokenizer

# When a stop string ended every choice, the engine's own word on them (cached tokens, times) is
# waited for, but not long: the text is complete.
LAST_WORD_SECONDS = 1.0


@dataclass(slots=True)
class _Choice:
    """A choice on its way: its text, and what the engine said at its end."""

    request: Request
    number: int  # within the request
    text: ChoiceText
    finish: Finish | None = None
    first_output: float | None = None
    last_output: float | None = None
    gap: float = 0.0  # the largest between two outputs


@dataclass(slots=True)
class Generation:
    """Runs a `Job`. Use: `start`, then `pieces` until it returns None; `close` in any case."""

    engine: Engine
    job: Job
    tokenizer: Tokenizer
    observer: Observer
    clock: Callable[[], float] = time.monotonic
    prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    first_output: float | None = None
    transcript: list[list[str]] | None = None  # each choice's pieces of text, when they are logged
    _choices: dict[tuple[str, int], _Choice] = field(default_factory=dict)
    _streams: list[RequestStream] = field(default_factory=list)
    _source: RequestStream | None = None
    _problem: ApiError | None = None  # of a choice that ended without an answer

    def start(self) -> None:
        """Hand every prompt to the engine. Raises `ApiError`."""
        job = self.job
        for p, request in enumerate(job.requests):
            for c in range(job.n):
                decoder = self.tokenizer.detokenizer(
                    request.prompt, skip_special_tokens=job.view.skip_special_tokens
                )
                text = ChoiceText(p * job.n + c, decoder, job.view)
                self._choices[request.id, c] = _Choice(request, c, text)
        try:
            for request in job.requests:
                self._streams.append(self.engine.submit(request))
        except (RejectedError, EngineDeadError) as error:
            self.close()
            raise from_engine(error) from None
        self._source = self._streams[0] if len(self._streams) == 1 else FanIn(self._streams)

    async def settle(self, seconds: float) -> None:
        """Wait a moment for the first outputs, so that a refusal by the engine can still become an
        HTTP status. Raises `ApiError`."""
        assert self._source is not None
        try:
            async with asyncio.timeout(seconds):
                await self._source.arrival()
        except TimeoutError:
            pass  # admitted, or still in the queue: from now on errors are events of the stream
        except (RejectedError, EngineDeadError) as error:
            self.close()
            raise from_engine(error) from None

    async def pieces(self) -> list[Piece] | None:
        """What the next batch of outputs brought, perhaps nothing to show; None at the end.

        Raises `ApiError` when a choice did not end naturally.
        """
        try:
            outputs = await self._next_batch()
        except (RejectedError, EngineDeadError) as error:
            if self._all_shown():
                return None
            raise from_engine(error) from None
        if not outputs:
            return None
        now = self.clock()
        pieces = [piece for output in outputs for piece in self._take(output, now)]
        if self._problem is not None:  # raised once every end that came is counted
            raise self._problem
        return pieces

    def close(self) -> None:
        """Abort whatever still runs."""
        if self._source is not None:
            self._source.close()
        for stream in self._streams:
            stream.close()

    def prompt_scores(self, index: int) -> tuple[TokenLogprob | None, ...]:
        """The prompt's log-probabilities, which may have come with any choice of that prompt."""
        first = index - index % self.job.n
        found = (self.prompt_logprobs.get(i) for i in range(first, first + self.job.n))
        return next((scores for scores in found if scores is not None), ())

    @property
    def unfinished(self) -> int:
        """Choices of whose end the engine has not told."""
        return sum(choice.finish is None for choice in self._choices.values())

    @property
    def resumptions(self) -> int:
        """How often it went on in another engine after its own had died."""
        return 0 if self._source is None else self._source.resumptions

    def usage(self) -> Usage:
        """Counts so far."""
        usage = Usage(prompt_tokens=sum(len(r.prompt) for r in self.job.requests))
        cached: dict[str, int] = {}
        for choice in self._choices.values():
            if not self.job.view.scoring:
                usage.completion_tokens += choice.text.count
            if choice.finish is not None:  # siblings find the first one's prompt in the cache
                name, tokens = choice.request.id, choice.finish.cached_tokens
                cached[name] = min(tokens, cached.get(name, tokens))
                usage.drafted += choice.finish.drafted
                usage.accepted += choice.finish.accepted
                usage.demoted += choice.finish.demoted
        usage.cached_tokens = sum(cached.values())
        return usage

    def timings(self) -> dict[str, float | None]:
        """Milliseconds, from the engine's account of the choices that have ended."""
        finishes = [c.finish for c in self._choices.values() if c.finish is not None]
        arrival = self.job.requests[0].arrival
        return timings(finishes, arrival, self.first_output, self.clock())

    async def _next_batch(self) -> list[Output]:
        assert self._source is not None
        if not self._all_shown():
            return await self._source.batch()
        try:
            return await asyncio.wait_for(self._source.batch(), LAST_WORD_SECONDS)
        except TimeoutError:
            return []

    def _all_shown(self) -> bool:
        return len(self.finish_reasons) == len(self._choices)

    def _take(self, output: Output, now: float) -> list[Piece]:
        choice = self._choices[output.request_id, output.choice]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.setdefault(choice.text.index, output.prompt_logprobs)
        pieces = []
        if output.tokens and not choice.text.ended:
            self._observe(choice, len(output.tokens), now)
            if not self.job.view.scoring:
                pieces.append(self._push(choice, output))
        if output.finish is not None:
            choice.finish = output.finish
            self.observer.finished(choice.request, choice.number, output.finish)
            first = choice.first_output
            since = None if first is None else first - choice.request.arrival
            self.observer.targets(choice.request, since, choice.gap, output.finish)
            self._observe_longest(choice.request)
            if not choice.text.ended:
                problem = self._unnatural(output.finish)
                if problem is None:
                    pieces.append(self._end(choice, output.finish))
                self._problem = self._problem or problem
        for piece in pieces:
            if piece.finish is not None:
                self.finish_reasons[piece.index] = piece.finish
            if self.transcript is not None:
                self.transcript[piece.index].append(piece.text)
        return pieces

    def _push(self, choice: _Choice, output: Output) -> Piece:
        piece = choice.text.push(output.tokens, output.logprobs)
        if piece.finish is not None:
            self.engine.abort(
                output.request_id, output.choice, FinishReason.STOP, choice.text.count
            )
        return piece

    def _end(self, choice: _Choice, finish: Finish) -> Piece:
        piece = choice.text.end(finish)
        if self.job.view.scoring:  # the one token, even an end token, is not part of the answer
            piece.finish, piece.stop_reason, piece.tokens = "length", None, []
        return piece

    def _observe(self, choice: _Choice, tokens: int, now: float) -> None:
        if self.first_output is None:
            self.first_output = now
        if choice.last_output is None:
            choice.first_output = now
            self.observer.first_tokens(now - choice.request.arrival, tokens)
        else:
            choice.gap = max(choice.gap, now - choice.last_output)
            self.observer.more_tokens(now - choice.last_output, tokens)
        choice.last_output = now

    def _observe_longest(self, request: Request) -> None:
        """Once every choice of a prompt has ended."""
        finishes = [self._choices[request.id, c].finish for c in range(request.n)]
        if all(finishes):
            self.observer.longest(max(f.completion_tokens for f in finishes if f is not None))

    def _unnatural(self, finish: Finish) -> ApiError | None:
        """What to tell the client of an end that is no answer."""
        match finish.reason:
            case FinishReason.ERROR:
                return failed(finish.message or "The request failed in the engine.")
            case FinishReason.TIMEOUT:
                return timed_out()
            case FinishReason.QUEUE_TIMEOUT:
                return never_started(self.engine.load.predicted_wait)
            case FinishReason.ABORT:
                return unavailable(finish.message or "The request was ended by the server.")
            case _:
                return None
