"""The engine's loop: joins the pure scheduler to a worker and to the API processes.

    loop     plan 1         plan 2 | settle 1  publish 1  plan 3 | settle 2  publish 2  plan 4 | ...
    worker          [ ----- step 1 ----- ][ ------- step 2 ------- ][ ------- step 3 ------- ][ ...

Plan N + 1 is launched before the result of step N is read, so the worker finds its next step
waiting and never idles for the loop; but not long before step N is predicted to end, for whoever
arrives until then is in it. The loop sleeps in one place, `transport.receive`, which returns for a
message, for a finished step (the worker's thread calls `wake`), when a step is to be planned or at
the end of a drain; nothing spins.

A turn applies messages before it settles, so that an abort that arrived while a step ran already
counts when its result is read: the row dies on its epoch and its tokens are not published.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from engine.messages import (
    Abort,
    Dead,
    Drain,
    EngineFacts,
    FromEngine,
    Hello,
    Ready,
    Rejected,
    Step,
    Submit,
    ToEngine,
)
from engine.transport import EngineTransport
from scheduler.gate import Overloaded
from scheduler.plan import StepPlan, StepResult
from scheduler.policy import IN_FLIGHT, plan_at
from scheduler.request import Output, Request
from scheduler.scheduler import ContextTooLong, Scheduler

log = logging.getLogger(__name__)

# The scheduler holds work but plans nothing although nothing is in flight: asked again after this.
RETRY_SECONDS = 0.02


class PendingStep(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Blocks until the step is done; raises what the worker raised."""
        ...

    def done(self) -> bool: ...

    def notify(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once the step is done (at once if it is), from any thread."""
        ...


class StepWorker(Protocol):
    """What the loop needs of a worker."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts a step, and does not wait for its end; steps run in the order of their launch."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Route:
    """Where the outputs of one live request go."""

    client: bytes
    request_id: str  # the client's name for it
    choices_left: int


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan
    pending: PendingStep


class EngineCore:
    """One scheduler, one worker, any number of API processes.

    Request ids are unique per API process; where two collide, the scheduler knows the later one
    under a longer name.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        worker: StepWorker,
        transport: EngineTransport,
        facts: EngineFacts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._worker = worker
        self._transport = transport
        self._facts = facts
        self._clock = clock
        self._in_flight: deque[_InFlight] = deque()
        self._hold = 0.0  # until then the step after the one that runs is not planned
        self._clients: set[bytes] = set()
        self._routes: dict[str, _Route] = {}  # by the scheduler's id
        self._outbox: dict[bytes, list[Output]] = {}
        self._drain_until: float | None = None
        self._fault: Exception | None = None

    def run(self) -> None:
        """Serves until drained. Raises what the worker or the scheduler raised: a fault."""
        while not self.drained:
            self.turn()

    @property
    def drained(self) -> bool:
        """No more work will be accepted and none is left."""
        return self._drain_until is not None and not self._routes

    def turn(self) -> None:
        """Sleeps until something happened, then does what became possible.

        Settles one step at most, so that messages are heard between any two.
        """
        for client, message in self._transport.receive(self._patience()):
            self._handle(client, message)
        if self._fault is not None:
            raise self._fault
        self._end_drain()
        self._publish()
        if self._in_flight and self._in_flight[0].pending.done():
            self._settle(self._in_flight.popleft())
        self._launch()
        self._publish()

    def drain(self, seconds: float) -> None:
        """Refuses what comes from now on; `run` ends when the rest has finished or been aborted."""
        until = self._clock() + seconds
        self._drain_until = until if self._drain_until is None else min(self._drain_until, until)

    def fail(self, fault: Exception) -> None:
        """Has `run` raise this, though no step may ever return. From any thread."""
        self._fault = fault
        self._transport.wake()

    def announce_death(self, message: str) -> None:
        """The last words to every API process."""
        for client in self._clients:
            self._transport.send(client, Dead(message))

    # -- sleeping ---------------------------------------------------------------------------

    def _patience(self) -> float | None:
        """Seconds until something has to be done even if nobody wakes the loop; None: no end."""
        if self._in_flight and self._in_flight[0].pending.done():
            return 0.0  # its wake-up may be spent: two steps that end at once wake a loop once
        if not self._in_flight and self._scheduler.has_work():
            return RETRY_SECONDS
        until = math.inf if self._drain_until is None else self._drain_until
        now = self._clock()
        if self._held(now):
            until = min(until, self._hold)
        return None if until == math.inf else max(until - now, 0.0)

    # -- messages ---------------------------------------------------------------------------

    def _handle(self, client: bytes, message: ToEngine) -> None:
        match message:
            case Submit(request, age):
                self._submit(client, request, age)
            case Abort():
                self._abort(self._find(client, message.request_id), message)
            case Drain(seconds):
                self.drain(seconds)
            case Hello():
                self._clients.add(client)
                self._send(client, Ready(self._facts, self._scheduler.load()))

    def _submit(self, client: bytes, request: Request, age: float) -> None:
        self._clients.add(client)
        now = self._clock()
        if self._drain_until is not None:
            refusal = Rejected(request.id, "draining", "the server is shutting down")
            self._send(client, refusal)
            return
        name = request.id
        if name in self._routes:
            if self._routes[name].client == client:
                self._send(client, Rejected(request.id, "invalid", "this id is already running"))
                return
            name = _long_name(client, request.id)
        admitted = _on_our_clock(request, name, now - age)
        try:
            self._scheduler.add(admitted, now)
        except Overloaded as error:
            refusal = Rejected(request.id, error.reason, str(error), error.retry_after)
            self._send(client, refusal)
            return
        except ContextTooLong as error:
            self._send(client, Rejected(request.id, "context_length_exceeded", str(error)))
            return
        except ValueError as error:
            self._send(client, Rejected(request.id, "invalid", str(error)))
            return
        self._routes[name] = _Route(client, request.id, len(request.open_choices))

    def _find(self, client: bytes, request_id: str) -> str | None:
        """The scheduler's name for a client's request; None when it is not running."""
        for name in (request_id, _long_name(client, request_id)):
            route = self._routes.get(name)
            if route is not None and route.client == client:
                return name
        return None

    def _abort(self, name: str | None, abort: Abort) -> None:
        if name is None:
            return  # it ended meanwhile
        outputs = self._scheduler.abort(
            name, self._clock(), abort.choice, abort.reason, abort.tokens_kept
        )
        self._collect(outputs)

    def _end_drain(self) -> None:
        """Aborts what is left at the drain's deadline."""
        now = self._clock()
        if self._drain_until is not None and now >= self._drain_until:
            for name in list(self._routes):
                self._collect(self._scheduler.abort(name, now))

    # -- steps ------------------------------------------------------------------------------

    def _launch(self) -> None:
        while len(self._in_flight) < IN_FLIGHT:
            now = self._clock()
            if self._held(now):
                return
            plan = self._scheduler.plan(now)
            self._collect(self._scheduler.take_outputs())
            if plan is None:
                return
            pending = self._worker.launch(plan)
            if not self._in_flight:
                self._begins(plan, now)
            self._in_flight.append(_InFlight(plan, pending))
            pending.notify(self._transport.wake)

    def _held(self, now: float) -> bool:
        """Whether the next step is better planned later: a step runs, and will for a while, in
        which requests may come that otherwise would wait for a step more."""
        return len(self._in_flight) == 1 and now < self._hold

    def _begins(self, plan: StepPlan, now: float) -> None:
        """The worker begins a step."""
        self._hold = plan_at(now, self._scheduler.cost.seconds(plan.shape))

    def _settle(self, step: _InFlight) -> None:
        result = step.pending.wait()
        now = self._clock()
        self._collect(self._scheduler.settle(step.plan, result, now))
        if self._in_flight:
            self._begins(self._in_flight[0].plan, now)
        if not self._in_flight:
            self._launch()  # the worker idles: feed it before the clients
        tokens = sum(
            1 + row.drafts if row.chunk is None else len(row.chunk) for row in step.plan.rows
        )
        self._publish(result.seconds, tokens)

    # -- outputs ----------------------------------------------------------------------------

    def _collect(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            name = output.request_id
            route = self._routes.get(name)
            if route is None:
                continue  # its API process is gone
            if route.request_id != name:
                output = replace(output, request_id=route.request_id)
            self._outbox.setdefault(route.client, []).append(output)
            if output.finish is not None:
                route.choices_left -= 1
                if not route.choices_left:
                    del self._routes[name]

    def _publish(self, seconds: float | None = None, tokens: int = 0) -> None:
        """Sends what was collected. With `seconds`, a step settled: tell everyone who waits.

        Everyone learns of the last step, for it frees the pages that ended sequences still held.
        """
        clients = set(self._outbox)
        if seconds is not None:
            clients.update(route.client for route in self._routes.values())
            if not self._in_flight:
                clients.update(self._clients)
        if not clients:
            return
        outbox, self._outbox = self._outbox, {}
        load = self._scheduler.load()
        for client in clients:
            outputs = tuple(outbox.get(client, ()))
            self._send(client, Step(outputs, load, seconds or 0.0, tokens))

    def _send(self, client: bytes, message: FromEngine) -> None:
        if self._transport.send(client, message):
            return
        # The API process died or hangs: nobody will read what its requests produce.
        self._clients.discard(client)
        orphans = [name for name, route in self._routes.items() if route.client == client]
        log.warning("lost an API process; aborting %d requests", len(orphans))
        for name in orphans:
            del self._routes[name]
            self._collect(self._scheduler.abort(name, self._clock()))  # may bring others' ends


def _on_our_clock(request: Request, name: str, arrival: float) -> Request:
    """The request as if it had arrived here, then: its deadlines keep their distance."""

    def moved(deadline: float | None) -> float | None:
        return None if deadline is None else arrival + (deadline - request.arrival)

    return replace(
        request,
        id=name,
        arrival=arrival,
        deadline=moved(request.deadline),
        queue_deadline=moved(request.queue_deadline),
    )


def _long_name(client: bytes, request_id: str) -> str:
    return f"{client.hex()}/{request_id}"
