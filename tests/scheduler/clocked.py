"""A scheduler whose steps take the time a cost model says, on a clock of its own; no worker.

Two steps are in flight, as in the engine's loop: one runs while the next waits.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import pairwise

from scheduler.plan import RowResult, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.request import Finish, Output, Request
from scheduler.scheduler import Scheduler

ONE = RowResult(tokens=(1,))
NONE = RowResult()


class Clocked:
    """Every token is 1, so requests end by their length."""

    def __init__(
        self,
        scheduler: Scheduler,
        seconds: Callable[[StepShape], float],
        between: Callable[[float], float] = lambda took: 0.0,
    ) -> None:
        """`between`: seconds that pass after a step of so many before the next one starts."""
        self.scheduler = scheduler
        self.seconds = seconds
        self.between = between
        self.now = 0.0
        self.steps: list[tuple[StepPlan, float]] = []  # with the time each took
        self.times: dict[tuple[str, int], list[float]] = defaultdict(list)  # of every output
        self.ends: dict[tuple[str, int], Finish] = {}
        self.arrivals: dict[str, float] = {}
        self._in_flight: deque[tuple[StepPlan, float, float]] = deque()
        self._busy_until = 0.0

    def run(self, requests: Iterable[Request], until: float = float("inf")) -> None:
        """Adds each request at its arrival and runs until the end of all or the given time."""
        todo = deque(sorted(requests, key=lambda r: r.arrival))
        self.arrivals |= {r.id: r.arrival for r in todo}
        while self.now < until and (todo or self.scheduler.has_work()):
            while todo and todo[0].arrival <= self.now:
                self._arrive(todo.popleft())
            self._launch()
            moments = [self._in_flight[0][1]] if self._in_flight else []
            moments += [todo[0].arrival] if todo else []
            assert moments, "stuck"
            self.now = min(moments)
            if self._in_flight and self._in_flight[0][1] <= self.now:
                self._settle()

    def _launch(self) -> None:
        while len(self._in_flight) < 2:
            plan = self.scheduler.plan(self.now)
            self._take(self.scheduler.take_outputs())
            if plan is None:
                return
            took = self.seconds(plan.shape)
            self._busy_until = max(self.now, self._busy_until) + took + self.between(took)
            self._in_flight.append((plan, self._busy_until, took))
            self.steps.append((plan, took))

    def _settle(self) -> None:
        plan, _, took = self._in_flight.popleft()
        result = StepResult(plan.step, self._rows(plan), took)
        self._take(self.scheduler.settle(plan, result, self.now))

    def _arrive(self, request: Request) -> None:
        self.scheduler.add(request, self.now)

    def _rows(self, plan: StepPlan) -> tuple[RowResult, ...]:
        return tuple(ONE if row.samples else NONE for row in plan.rows)

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.tokens:
                self.times[output.request_id, output.choice].append(self.now)
            if output.finish is not None:
                self.ends[output.request_id, output.choice] = output.finish

    def ttft(self, name: str) -> float:
        return self.times[name, 0][0] - self.arrivals[name]

    def gap(self, name: str, since: float = 0.0) -> float:
        """The largest gap between two outputs of a request's first choice, from a time on."""
        times = [t for t in self.times[name, 0] if t >= since]
        return max(b - a for a, b in pairwise(times))
