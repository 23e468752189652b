"""The real scheduler against a trace, in virtual time: hours in minutes, and nothing but decisions.

    trace ──▶ submit ──▶ plan ──▶ seconds of the step's shape ──▶ settle ──▶ records

It follows `engine/core.py`: plan N + 1 is launched before the result of step N is read, steps run
back to back, and requests are heard between. What is left out is what takes the scheduler's own
time and the network's. The worker is a count of tokens: it ends each request after as many as the
trace says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from scheduler.gate import Overloaded
from scheduler.outcome import Record, SimulationReport, Targets, Timeline
from scheduler.plan import RowResult, StepPlan, StepResult
from scheduler.policy import IN_FLIGHT, plan_at
from scheduler.profile import StepShape
from scheduler.request import Output, Request, SamplingParams
from scheduler.rows import shape_as_run
from scheduler.scheduler import ContextTooLong, Scheduler
from scheduler.simulated_drafts import DraftingCosts, Drafts
from scheduler.trace import TraceRequest

RETRY_SECONDS = 0.02  # as in the engine: work is there, but nothing can run
PATIENCE = 10_000  # retries in a row after which the scheduler counts as stuck

STOP, FILLER = 0, 1  # tokens: the end of every answer, and nearly all others
FIRST_NAME = 2  # tokens from here on begin a group's prefix, or what is a request's own

_NOTHING = RowResult()
_MORE = RowResult(tokens=(FILLER,))
_END = RowResult(tokens=(STOP,))


class Costs(Protocol):
    """What steps take. `StepCost` is one."""

    def seconds(self, shape: StepShape) -> float: ...

    def copy_seconds(self, pages: int) -> float: ...


class StuckError(RuntimeError):
    """The scheduler holds requests but never runs them."""


class CountingWorker:
    """Emits tokens so that every request ends after its true length. Obeys plans as others do.

    It knows requests by their seed, which is their number in the trace.
    """

    def __init__(self, slots: int, drafting: DraftingCosts | None = None) -> None:
        self._drafts = Drafts(slots, drafting)
        self._prompt = [0] * (slots + 1)  # by slot: its tokens
        self._requests: dict[int, TraceRequest] = {}
        self._length = [0] * (slots + 1)  # by slot: tokens it stands at
        self._end = [0] * (slots + 1)  # by slot: the length at which it stops; 0: it never does
        self._drafted = False  # there were drafts in the last step

    def expect(self, number: int, request: TraceRequest) -> None:
        self._requests[number] = request

    def run(self, plan: StepPlan, costs: Costs) -> StepResult:
        length, end = self._length, self._end
        for admit in plan.admits:
            request = self._requests[admit.params.seed]
            stops = request.output_tokens < request.max_tokens
            length[admit.slot] = len(admit.cached)
            self._prompt[admit.slot] = admit.prompt_len
            self._drafts.admit(admit.slot, request.right)
            end[admit.slot] = admit.prompt_len + request.output_tokens if stops else 0
        rows: list[RowResult] = []
        over = self._over(plan)
        drafting, without = self._drafts.draft(plan, over)
        for row in plan.rows:
            slot = row.slot
            if slot in over:
                rows.append(_NOTHING)
                continue
            if row.chunk is not None:
                length[slot] += len(row.chunk)
                if not row.samples:
                    rows.append(_NOTHING)
                    continue
            if row.drafts:
                drafts = 0 if slot in without else row.drafts
                rows.append(self._verify(slot, drafts, row.ahead))
                continue
            length[slot] = now = length[slot] + 1
            rows.append(_END if now == end[slot] else _MORE)
        result = StepResult(plan.step, tuple(rows), drafting=drafting, over=len(over))
        shape = shape_as_run(plan, result) if without or over else plan.shape
        seconds = costs.seconds(shape)
        drafting = self._drafts.verified(plan, over, drafting, seconds)
        return replace(result, seconds=seconds, drafting=drafting)

    def _over(self, plan: StepPlan) -> set[int]:
        """Slots of live rows whose texts have ended, where that is known when the step begins."""
        drafted, self._drafted = self._drafted, any(row.drafts for row in plan.rows)
        if not (drafted or self._drafted):
            return set()
        end, length = self._end, self._length
        live = [row.slot for row in plan.rows if row.chunk is None]
        return {slot for slot in live if 0 < end[slot] <= length[slot]}

    def _verify(self, slot: int, drafts: int, ahead: int) -> RowResult:
        length, end = self._length[slot], self._end[slot]
        gained = 1 + self._drafts.verify(slot, length - self._prompt[slot], drafts, ahead)
        tokens = [FILLER] * gained
        if end and length + gained >= end:
            tokens = [*tokens[: end - length - 1], STOP]
        self._length[slot] += len(tokens)
        return RowResult(tokens=tuple(tokens), proposed=drafts, drafter=0)


class Prompts:
    """Token ids of prompts: equal where requests share a prefix, and nowhere else.

    One token, at the beginning, tells prefixes and requests apart; page hashes are chained, so it
    tells all that follows apart too. The rest is filler, as answers are: therefore an answer to a
    prompt that is all prefix continues the prefix.
    """

    def __init__(self) -> None:
        self._next = FIRST_NAME
        self._groups: dict[tuple[str, str], int] = {}  # by tenant and name

    def tokens(self, request: TraceRequest) -> tuple[int, ...]:
        shared, length = request.prefix_tokens, request.prompt_tokens
        head: tuple[int, ...] = ()
        if shared and request.prefix_group is not None:
            key = (request.tenant, request.prefix_group)
            if key not in self._groups:
                self._groups[key] = self._name()
            head = (self._groups[key], *(FILLER,) * (shared - 1))
        own = length - shared
        return head if not own else (*head, self._name(), *(FILLER,) * (own - 1))

    def _name(self) -> int:
        self._next += 1
        return self._next - 1


class SimulatedEngine:
    """One scheduler and its worker, driven by events in virtual time.

    `run_until` brings it up to an instant, `submit` tells it of a request that arrives then. So
    several engines can share a trace, see `capacity.py`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cost: Costs,
        targets: Targets,
        *,
        interval: float = 1.0,
        deadline: float | None = None,
        on_plan: Callable[[StepPlan, float], None] | None = None,
        drafting: DraftingCosts | None = None,
    ) -> None:
        """`interval` is that of the time series; `deadline` ends requests so long after their
        arrival; `on_plan` is shown every plan, and when it is made; `drafting` is what drafts
        take."""
        self.scheduler = scheduler
        self.records: list[Record] = []
        self.timeline = Timeline(interval)
        self.pending = 0  # requests that have not ended
        self.missed = 0  # that ended, or were refused, without meeting the targets
        self._cost = cost
        self._targets = targets
        self._deadline = deadline
        self._on_plan = on_plan
        self._worker = CountingWorker(scheduler.config.max_num_seqs, drafting)
        self._prompts = Prompts()
        self._open: dict[str, Record] = {}
        self._in_flight: deque[tuple[StepPlan, StepResult, float]] = deque()  # done at
        self._free = 0.0  # when the worker has run all that was launched
        self._heard = math.inf  # an arrival that the loop has not yet acted upon
        self._retry = math.inf
        self._retries = 0
        self._hold = 0.0  # until then the step after the one that runs is not planned
        self._held = math.inf  # the same, while it waits for that

    def submit(self, request: TraceRequest, number: int) -> Record:
        """The request of that number arrives, at an instant up to which the engine was run."""
        self._worker.expect(number, request)
        record = Record(request)
        self.records.append(record)
        now = request.arrival
        params = SamplingParams(
            max_tokens=request.max_tokens, seed=number, stop_token_ids=frozenset((STOP,))
        )
        submitted = Request(
            id=name_of(number),
            prompt=self._prompts.tokens(request),
            params=params,
            arrival=now,
            priority=request.priority,
            tenant=request.tenant,
            deadline=None if self._deadline is None else now + self._deadline,
        )
        try:
            self.scheduler.add(submitted, now)
        except (Overloaded, ContextTooLong) as refusal:
            record.refuse(str(refusal), now)
            self.missed += 1
            return record
        self._open[submitted.id] = record
        self.pending += 1
        self._heard = min(self._heard, now)
        return record

    def run_until(self, time: float) -> None:
        """Everything that happens before `time`."""
        while True:
            now = self._next()
            if now >= time:
                return
            self._turn(now)

    def finish(self, horizon: float = math.inf, most_misses: float = math.inf) -> None:
        """No more requests come: runs to the end, or until either bound is passed."""
        while self.missed <= most_misses:
            now = self._next()
            if now >= horizon or now == math.inf:
                return
            self.run_until(min(now + 1.0, horizon))

    def _next(self) -> float:
        """When something happens next; infinite if nothing will."""
        return min(self._heard, self._done, self._retry, self._held)

    @property
    def _done(self) -> float:
        return self._in_flight[0][2] if self._in_flight else math.inf

    def _turn(self, now: float) -> None:
        """One turn of the engine's loop."""
        self._heard = self._retry = math.inf
        if self._done <= now:
            plan, result, _ = self._in_flight.popleft()
            self._collect(self.scheduler.settle(plan, result, now), now)
            self.timeline.steps += 1
            self.timeline.step_seconds += result.seconds
            if self._in_flight:
                self._begins(self._in_flight[0][0], now)
        self._launch(now)
        if self._in_flight or not self.scheduler.has_work():
            self._retries = 0
        else:
            self._retry = now + RETRY_SECONDS
            self._retries += 1
            if self._retries > PATIENCE:
                raise StuckError(f"{self.pending} requests wait, and none ever runs")
        self.timeline.note(now, self.scheduler.occupancy())

    def _launch(self, now: float) -> None:
        scheduler = self.scheduler
        self._held = math.inf
        while len(self._in_flight) < IN_FLIGHT:
            if self._in_flight and now < self._hold:
                self._held = self._hold
                return
            plan = scheduler.plan(now)
            self._collect(scheduler.take_outputs(), now)
            if plan is None:
                return
            if self._on_plan is not None:
                self._on_plan(plan, now)
            copies = self._cost.copy_seconds(plan.copies) if plan.copies else 0.0
            result = self._worker.run(plan, self._cost)
            seconds = copies + result.drafting.seconds + result.seconds
            self._free = max(self._free, now) + seconds
            if not self._in_flight:
                self._begins(plan, now)
            self._in_flight.append((plan, result, self._free))

    def _begins(self, plan: StepPlan, now: float) -> None:
        """The worker begins a step."""
        self._hold = plan_at(now, self.scheduler.cost.seconds(plan.shape))

    def _collect(self, outputs: Iterable[Output], now: float) -> None:
        records = self._open
        for output in outputs:
            record = records[output.request_id]
            if output.tokens:
                gap = now - record.last
                if gap > record.gap:
                    record.gap = gap
                record.last = now
            if output.finish is not None:
                record.finish(output.finish)
                del records[output.request_id]
                self.pending -= 1
                self.missed += not record.met(self._targets)

    def play(
        self,
        trace: Iterable[TraceRequest],
        horizon: float = math.inf,
        most_misses: float = math.inf,
    ) -> SimulationReport:
        """Runs a whole trace, sorted by arrival; the bounds are those of `simulate`."""
        for number, request in enumerate(trace):
            if request.arrival >= horizon or self.missed > most_misses:
                break
            self.run_until(request.arrival)
            self.submit(request, number)
        self.finish(horizon, most_misses)
        return self.report()

    def report(self) -> SimulationReport:
        """What has come of everything so far."""
        return SimulationReport(self.records, self._targets, self.scheduler.load(), self.timeline)


def name_of(number: int) -> str:
    """The scheduler's id for the request of that number in the trace."""
    return str(number)


def true_lengths(trace: Iterable[TraceRequest]) -> dict[str, int]:
    """What an oracle is told: output lengths by request id."""
    return {name_of(number): request.output_tokens for number, request in enumerate(trace)}


def simulate(
    trace: Iterable[TraceRequest],
    scheduler: Scheduler,
    cost: Costs,
    targets: Targets,
    *,
    interval: float = 1.0,
    deadline: float | None = None,
    horizon: float = math.inf,
    most_misses: float = math.inf,
    on_plan: Callable[[StepPlan, float], None] | None = None,
    drafting: DraftingCosts | None = None,
) -> SimulationReport:
    """Runs a trace, sorted by arrival, through a new scheduler to the end.

    Or to the `horizon`, in seconds of the trace; or until more than `most_misses` requests have
    missed their targets, for whoever only wants to know whether that many do.
    """
    engine = SimulatedEngine(
        scheduler,
        cost,
        targets,
        interval=interval,
        deadline=deadline,
        on_plan=on_plan,
        drafting=drafting,
    )
    return engine.play(trace, horizon, most_misses)
