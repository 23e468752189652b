"""Drives a scheduler and a worker without processes or clocks, at any pipelining depth."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from scheduler.request import Finish, Output, Request, TokenLogprob
from scheduler.scheduler import Scheduler
from worker.worker import Worker


@dataclass(slots=True)
class Result:
    """Everything one choice of a request brought."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None


def drive(
    scheduler: Scheduler,
    worker: Worker,
    requests: Iterable[Request],
    *,
    depth: int = 1,
    arrivals_per_step: int = 1000,
) -> dict[tuple[str, int], Result]:
    """Runs requests to their ends; at most `depth` steps are launched beyond the one awaited."""
    waiting = deque(requests)
    results: dict[tuple[str, int], Result] = {}
    launched: deque = deque()
    now = 0.0

    def take(outputs: Iterable[Output]) -> None:
        for output in outputs:
            result = results.setdefault((output.request_id, output.choice), Result())
            assert result.finish is None, "output after the terminal one"
            result.tokens += output.tokens
            result.logprobs += output.logprobs
            if output.prompt_logprobs is not None:
                result.prompt_logprobs = output.prompt_logprobs
            result.finish = output.finish

    while waiting or launched or scheduler.has_work():
        now += 0.01
        for _ in range(min(arrivals_per_step, len(waiting))):
            scheduler.add(waiting.popleft(), now)
        plan = scheduler.plan(now)
        if plan is not None:
            launched.append((plan, worker.launch(plan)))
        while launched and (len(launched) > depth or plan is None):
            settled, pending = launched.popleft()
            take(scheduler.settle(settled, pending.wait(), now))
            if plan is None:
                break
    scheduler.check()
    return results
