"""From events in a request's life to metrics, timings and the log line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.messages import Step
from scheduler.request import Finish, FinishReason, Request
from server.job import Job
from server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Observer:
    """Translates events into observations. All times in seconds."""

    metrics: Metrics
    ttft_target: float | None = None  # of requests without their own
    mtpot_target: float | None = None  # the stricter counts

    def accepted(self, job: Job) -> None:
        for name in job.ignored:
            self.metrics.ignored(name)
        for request in job.requests:
            self.metrics.params_n.add(request.n)
            if job.max_tokens is not None:
                self.metrics.params_max_tokens.add(job.max_tokens)

    def step(self, step: Step) -> None:
        if step.step_tokens:
            self.metrics.step_tokens.add(step.step_tokens)

    def resumed(self, request: Request) -> None:
        """It goes on in another engine."""
        self.metrics.resumed.add()

    def first_tokens(self, since_arrival: float, tokens: int) -> None:
        """A choice's first output. Tokens beyond the first came at the same time."""
        self.metrics.first_token.add(since_arrival)
        self.metrics.generation_tokens.add(tokens)
        if tokens > 1:
            self.metrics.inter_token.add(0.0, tokens - 1)

    def more_tokens(self, since_last: float, tokens: int) -> None:
        self.metrics.generation_tokens.add(tokens)
        self.metrics.inter_token.add(since_last / tokens, tokens)

    def finished(self, request: Request, choice: int, finish: Finish) -> None:
        """The engine's account of one choice, whatever its end."""
        m = self.metrics
        m.success.add(label=str(finish.reason))
        m.generation_tokens.add(finish.stop_token is not None)  # generated, though not shown
        m.request_generation_tokens.add(finish.completion_tokens)
        m.preemptions.add(finish.preemptions)
        m.e2e.add(finish.finished - finish.arrival)
        if choice == 0:
            m.prompt_tokens.add(len(request.prompt))
            m.prompt_tokens_cached.add(finish.cached_tokens)
            m.request_prompt_tokens.add(len(request.prompt))
        if finish.admitted is None or finish.resumptions:
            return  # it never ran, or nobody knows when it first did
        m.queue.add(finish.admitted - finish.arrival)
        m.inference.add(finish.finished - finish.admitted)
        if finish.first_token is None:
            return
        m.prefill.add(finish.first_token - finish.admitted)
        if finish.predicted_first_token is not None:
            predicted = finish.predicted_first_token - finish.arrival
            m.wait_ratio.add((finish.first_token - finish.arrival) / predicted)
        m.decode.add(finish.finished - finish.first_token)
        if finish.completion_tokens > 1:
            mean = (finish.finished - finish.first_token) / (finish.completion_tokens - 1)
            m.per_output_token.add(mean)

    def targets(self, request: Request, first: float | None, gap: float, finish: Finish) -> None:
        """Whether a choice's latency targets were met: `first` is when its first token was out,
        after its arrival, `gap` its largest gap. Who left before the first token counts for none,
        who was never served in time has missed it."""
        late = finish.reason in (FinishReason.TIMEOUT, FinishReason.QUEUE_TIMEOUT)
        wanted = request.ttft_target or self.ttft_target
        if wanted is not None and (first is not None or late):
            met = first is not None and first <= wanted
            self.metrics.ttft_targets.add(label=_outcome(met))
        gaps = [g for g in (request.mtpot_target, self.mtpot_target) if g is not None]
        if gaps and first is not None:
            self.metrics.mtpot_targets.add(label=_outcome(gap <= min(gaps)))

    def abandoned(self, choices: int, reason: FinishReason) -> None:
        """Choices whose end nobody waited for, or whose engine is gone."""
        if choices:
            self.metrics.success.add(choices, str(reason))

    def longest(self, tokens: int) -> None:
        """Of one prompt's choices, when the last has ended."""
        self.metrics.max_generation_tokens.add(tokens)


def timings(
    finishes: Sequence[Finish], arrival: float, first_output: float | None, now: float
) -> dict[str, float | None]:
    """What `timings: true` returns: milliseconds as the client's side of the server saw them, and
    the wait for a slot as the engine did."""
    tokens = sum(finish.completion_tokens for finish in finishes)
    waits = [
        f.admitted - f.arrival for f in finishes if f.admitted is not None and not f.resumptions
    ]
    after_first = None if first_output is None else now - first_output
    longest = max((finish.completion_tokens for finish in finishes), default=0)
    return {
        "queue_time_ms": _ms(min(waits, default=None)),
        "time_to_first_token_ms": _ms(None if first_output is None else first_output - arrival),
        "generation_time_ms": _ms(after_first),
        "mean_itl_ms": _ms(after_first / (longest - 1) if after_first and longest > 1 else None),
        "tokens_per_second": round(tokens / (now - arrival), 3) if now > arrival else None,
    }


def _outcome(met: bool) -> str:
    return "met" if met else "missed"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
