"""Stand-ins for an engine, for tests of what lies above it.

`ScriptedEngine` has the face of `engine.client.EngineClient`: tokens come from a script instead of
a model, with the delays and faults a test asks for. No torch, no processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.errors import EngineDeadError, RejectedError
from engine.messages import EngineFacts, Step
from engine.stream import RequestStream
from scheduler.request import Finish, FinishReason, Load, Output, Request, TokenLogprob

Script = Callable[[Request, int], Sequence[int]]

FACTS = EngineFacts(
    max_model_len=512,
    vocab_size=512,
    num_pages=64,
    page_size=16,
    max_num_seqs=8,
    max_logprobs=20,
    device="none",
    dtype="none",
    drafters=("suffix",),
)


def fixed(tokens: Sequence[int]) -> Script:
    """Every choice says the same."""
    return lambda request, choice: tokens


def logprob(token: int) -> float:
    """A made-up log-probability that depends on the token alone."""
    return -(int.from_bytes(hashlib.sha256(b"%d" % token).digest()[:2]) / 2**16) - 0.01


def scored(token: int, top: int, vocab_size: int) -> TokenLogprob:
    """The token is the most likely one; the others follow by id."""
    others = [(token + i) % vocab_size for i in range(1, top)]
    ranked = [(token, logprob(token)), *((t, -20.0 - i) for i, t in enumerate(others))]
    return TokenLogprob(token, logprob(token), 1, tuple(ranked[:top]))


@dataclass
class ScriptedEngine:
    """Runs each choice through its script, `group` tokens a step, `delay` seconds a step.

    Honours max_tokens, stop token ids, min_tokens, logprobs and aborts; penalties and the like are
    recorded in `requests` and have no effect. Scripts that run dry repeat their last token.
    """

    script: Script
    facts: EngineFacts | None = FACTS
    delay: float = 0.0
    group: int = 1
    cached_tokens: int = 0
    drafts: tuple[int, int] = (0, 0)  # that each choice ends with: made, right
    demoted: int = 0  # positions, of each choice
    healthy: bool = True
    serving: bool = True
    load: Load = field(default_factory=lambda: Load(pages_total=64))
    reject: RejectedError | None = None  # submitted requests are refused, a moment later
    fail_after: int | None = None  # tokens of a choice after which it ends with ERROR
    die_after: int | None = None  # tokens of a choice after which the whole engine dies
    abort_after: int | None = None  # tokens of a choice after which the engine aborts it
    late_after: int | None = None  # tokens of a choice after which its deadline has passed
    queue_timeout: float | None = None  # seconds after which every request ends unstarted
    stall_after: int | None = None  # tokens of a choice after which nothing more comes
    resume_after: int | None = None  # tokens of choice 0 after which another engine takes over
    requests: list[Request] = field(default_factory=list)
    aborts: list[tuple[str, int | None, FinishReason, int | None]] = field(default_factory=list)
    on_step: Callable[[Step], None] = lambda step: None
    on_resume: Callable[[Request], None] = lambda request: None
    _streams: dict[str, RequestStream] = field(default_factory=dict)
    _tasks: dict[tuple[str, int], asyncio.Task[None]] = field(default_factory=dict)
    _made: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def running(self) -> int:
        """Choices still producing."""
        return sum(not task.done() for task in self._tasks.values())

    def submit(self, request: Request) -> RequestStream:
        if not self.serving:
            raise EngineDeadError("the engine is not ready")
        self.requests.append(request)
        stream = RequestStream(request, lambda: self.abort(request.id))
        self._streams[request.id] = stream
        if self.reject is not None:
            asyncio.get_running_loop().call_later(0.01, stream.fail, self.reject)
            return stream
        for choice in range(request.n):
            run = self._run(stream, request, choice)
            self._tasks[request.id, choice] = asyncio.create_task(run)
        return stream

    def abort(
        self,
        request_id: str,
        choice: int | None = None,
        reason: FinishReason = FinishReason.ABORT,
        tokens_kept: int | None = None,
    ) -> None:
        self.aborts.append((request_id, choice, reason, tokens_kept))
        stream = self._streams[request_id]
        for number in range(stream.request.n) if choice is None else (choice,):
            self._tasks[request_id, number].cancel()
            made = self._made.get((request_id, number), 0)
            self._put(stream, number, finish=self._finish(stream.request, reason, made))

    async def drain(self, seconds: float) -> None:
        """Waits for what runs, and aborts it after `seconds`."""
        running = [task for task in self._tasks.values() if not task.done()]
        if running:
            await asyncio.wait(running, timeout=seconds)
        for request_id, stream in list(self._streams.items()):
            if not stream.finished:
                self.abort(request_id)

    def die(self) -> None:
        """Every stream ends with `EngineDeadError`."""
        self.healthy = self.serving = False
        for task in self._tasks.values():
            task.cancel()
        for stream in self._streams.values():
            stream.fail(EngineDeadError())

    async def _run(self, stream: RequestStream, request: Request, choice: int) -> None:
        script = list(self.script(request, choice))
        params = request.params
        scores = None
        if params.prompt_logprobs is not None:
            top = params.prompt_logprobs
            scores = (None, *(self._scored(token, top) for token in request.prompt[1:]))
        made: list[int] = []
        if self.queue_timeout is not None:
            await asyncio.sleep(self.queue_timeout)
            finish = self._finish(request, FinishReason.QUEUE_TIMEOUT, 0)
            self._put(stream, choice, finish=finish)
            return
        while True:
            await asyncio.sleep(self.delay)
            batch: list[int] = []
            finish = None
            while len(batch) < self.group and finish is None:
                place = len(made)
                token = script[min(place, len(script) - 1)]
                if token in params.stop_token_ids and place >= params.min_tokens:
                    finish = self._finish(request, FinishReason.STOP, place + 1, token)
                    break
                made.append(token)
                batch.append(token)
                if len(made) == params.max_tokens:
                    finish = self._finish(request, FinishReason.LENGTH, len(made))
                for after, reason in (
                    (self.fail_after, FinishReason.ERROR),
                    (self.abort_after, FinishReason.ABORT),
                    (self.late_after, FinishReason.TIMEOUT),
                ):
                    if len(made) == after:
                        finish = self._finish(request, reason, len(made))
            self._made[request.id, choice] = len(made)
            logprobs = ()
            if params.logprobs is not None:
                logprobs = tuple(self._scored(token, params.logprobs) for token in batch)
            self._put(stream, choice, tuple(batch), logprobs, scores, finish)
            scores = None
            if finish is not None:
                return
            if choice == 0 and self.resume_after == len(made):
                stream.resumptions += 1
                self.on_resume(request)
            if self.die_after is not None and len(made) >= self.die_after:
                self.die()
            if self.stall_after is not None and len(made) >= self.stall_after:
                await asyncio.Event().wait()

    def _put(
        self,
        stream: RequestStream,
        choice: int,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
        finish: Finish | None = None,
    ) -> None:
        output = Output(stream.request.id, choice, tokens, logprobs, prompt_logprobs, finish)
        stream.put(output)
        self.on_step(Step((output,), self.load, step_tokens=len(tokens)))

    def _scored(self, token: int, top: int) -> TokenLogprob:
        assert self.facts is not None
        return scored(token, top, self.facts.vocab_size)

    def _finish(
        self, request: Request, reason: FinishReason, tokens: int, stop: int | None = None
    ) -> Finish:
        now = time.monotonic()
        return Finish(
            reason,
            stop_token=stop,
            message="scripted" if reason is FinishReason.ERROR else "",
            prompt_tokens=len(request.prompt),
            completion_tokens=tokens,
            cached_tokens=self.cached_tokens,
            drafted=self.drafts[0],
            accepted=self.drafts[1],
            demoted=self.demoted,
            arrival=request.arrival,
            admitted=None if reason is FinishReason.QUEUE_TIMEOUT else request.arrival,
            first_token=request.arrival if tokens else None,
            finished=now,
        )
