"""`Scheduler`: who runs in the next step, on which pages, and what a settled step has meant.

    add ──▶ waiting ──plan──▶ running ──settle──▶ ended        abort and deadlines end anyone
               ▲                 │
               └──── preempt ────┘

`plan` decides on a scratch copy (`decide.py`), then commits once. `settle` is the only place that
learns tokens. Several plans may be in flight; they settle in the order they were made.

One total order rules running sequences (`policy.order_of`): they are served in it, victims are
taken from its end. So the first in order is never preempted and always advances, whatever the
memory, and nothing can live-lock. Those that wait are in the same order, tenant by tenant; between
tenants, turns go by what each was served (`fair_share.py`).
"""

from __future__ import annotations

import heapq
from bisect import insort
from operator import attrgetter

from scheduler.admission import Admission, Policy, make_policy
from scheduler.choices import choices_of
from scheduler.counts import Counts
from scheduler.decide import Decider, Decision
from scheduler.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT
from scheduler.gate import Gate
from scheduler.memory import Hits, Memory
from scheduler.plan import Admit, Demotion, Row, RowResult, StepPlan, StepResult
from scheduler.policy import swap_pays
from scheduler.request import (
    Finish,
    FinishReason,
    Load,
    Occupancy,
    Output,
    Request,
    SchedulerConfig,
)
from scheduler.rows import launch_rows, shape_as_run
from scheduler.sequence import Phase, Sequence, WaitForecast
from scheduler.speculation import DraftPolicy, FixedDrafts
from scheduler.step_cost import StepCost
from scheduler.waiting import WaitingQueue


class ContextTooLong(ValueError):  # noqa: N818, a fact about the prompt
    """The prompt leaves no room for a single token, in the context or in the pool."""


class Scheduler:
    """Admission by forecast, mixed chunked prefill, preemption.

    `drafts` says how far each live row drafts ahead; `policy` how long answers are taken to get
    and how much memory is spared for being wrong; `cost` predicts step times and learns from
    every settled step.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        drafts: DraftPolicy | None = None,
        policy: Policy | None = None,
        cost: StepCost | None = None,
    ) -> None:
        self.config = config
        self.policy = policy or make_policy()
        self.cost = StepCost.learning() if cost is None else cost
        self._memory = Memory(config)
        self._admission = Admission(self.policy, self._memory.pool, config.page_size)
        self._drafts = drafts or FixedDrafts()
        self._requests: dict[str, list[Sequence]] = {}  # the unfinished choices
        self._waiting = WaitingQueue(credit=self._memory.max_len // 2)
        self._gate = Gate(config, self._memory, self._waiting, self.cost, self.policy)
        self._decider = Decider(
            config, self._memory, self._drafts, self._admission, self.cost, self._gate.waits
        )
        self._running: list[Sequence] = []  # sorted by order
        self._in_flight: dict[int, list[Sequence]] = {}  # by step, oldest first: one a row
        self._unadmitted: set[str] = set()  # requests of which no choice ever got a slot
        self._deadlines: list[tuple[float, str]] = []  # a heap of request ids; ended ones linger
        self._outputs: list[Output] = []  # ends decided by add and plan, not yet handed out
        self._blocked = False  # see Decision.blocked
        self._counts = Counts()
        self._next_serial = 0

    # --- requests come and go -------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queues a request.

        The choices of one request wait for the first to compute the prompt, then share its pages.
        A resumed request passes the gate: it was let in before, and its client has waited since.
        Raises `Overloaded`; `ContextTooLong` for what could never run; `ValueError` for an id that
        is in use.
        """
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        length, room = len(request.prompt), self._memory.max_len - 1
        if length > room:
            raise ContextTooLong(f"the prompt has {length} tokens, at most {room} fit")
        forecast = None
        if not request.resumed:
            forecast = self._gate.enter(request, self._running, self._counts.steps, now)
        account = self._waiting.open(request.tenant, len(request.open_choices), now)
        self._requests[request.id] = choices = choices_of(
            request, self.config, self._memory.max_len, self._next_serial, account
        )
        self._next_serial += request.n
        self._unadmitted.add(request.id)
        for deadline in (request.deadline, request.queue_deadline):
            if deadline is not None:
                heapq.heappush(self._deadlines, (deadline, request.id))
        self._blocked = False
        shares = self.config.enable_prefix_cache and length > self.config.page_size
        leader: Sequence | None = None
        for sequence in list(choices):
            self.policy.lengths.begin(sequence)
            self._drafts.begin(sequence)
            sequence.forecast = forecast
            if leader is not None and shares:
                self._waiting.park(sequence)
            else:
                self._waiting.push(sequence)
            if len(sequence.tokens) >= sequence.limit:  # it was complete before a restart
                self._outputs.append(self._end(sequence, FinishReason.LENGTH, now))
            else:
                leader = leader or sequence

    def abort(
        self,
        request_id: str,
        now: float,
        choice: int | None = None,
        reason: FinishReason = FinishReason.ABORT,
        tokens_kept: int | None = None,
    ) -> list[Output]:
        """Ends a request or one choice of it, wherever it is; what is in flight for it is lost.

        Idempotent; an unknown id is ignored. With `reason=STOP` this is a natural end found on
        text, and `tokens_kept` says how many output tokens belong to the answer.
        """
        return self.take_outputs() + [
            self._end(sequence, reason, now, completion_tokens=tokens_kept)
            for sequence in list(self._requests.get(request_id, ()))
            if choice is None or sequence.choice == choice
        ]

    def take_outputs(self) -> list[Output]:
        """Ends that `add` and `plan` decided on their own; `abort` and `settle` bring them too.

        Whoever got None from `plan` calls this, for there may be nothing to settle.
        """
        outputs, self._outputs = self._outputs, []
        return outputs

    def has_work(self) -> bool:
        return bool(self._requests or self._in_flight or self._outputs)

    # --- planning -------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when nothing can run, at least until a step in flight settles.

        Ends whatever is past its deadline, see `take_outputs`.
        """
        while self._deadlines and self._deadlines[0][0] <= now:
            self._end_late(heapq.heappop(self._deadlines)[1], now)
        if not self._requests:
            return None
        decision = self._decider.decide(
            self._running, self._waiting, bool(self._in_flight), self._blocked, now
        )
        return self._commit(decision, now)

    def _end_late(self, request_id: str, now: float) -> None:
        """Ends a request if one of its deadlines has passed: the id may be another's by now."""
        for late in list(self._requests.get(request_id, ())):
            ends, queued_until = late.request.deadline, late.request.queue_deadline
            if ends is not None and ends <= now:
                reason, message = FinishReason.TIMEOUT, "deadline exceeded"
            elif queued_until is None or queued_until > now or request_id not in self._unadmitted:
                return
            else:
                reason, message = FinishReason.QUEUE_TIMEOUT, "waited too long in the queue"
            self._outputs.append(self._end(late, reason, now, message=message))

    def _commit(self, decision: Decision, now: float) -> StepPlan | None:
        """Makes a decision real. All hits are pinned before any page is taken, so that none is
        evicted for another row of the same step."""
        self._blocked = decision.blocked
        self._counts.rows_stalled += decision.stalled
        demotions: tuple[Demotion, ...] = ()
        if decision.rows:  # first of all: see `PagePool.freed_by_dropping`
            demotions = tuple(self._demote(*page) for page in decision.demotions.values())
        for victim in decision.running[decision.keep :]:
            self._preempt(victim)
        if decision.head is not None:
            decision.head.overtaken += decision.overtakes
        for _, hits in decision.admits:
            self._memory.pin(hits)
        admits = tuple([self._seat(sequence, hits, now) for sequence, hits in decision.admits])
        if not decision.rows:
            return None
        rows, shape = launch_rows(decision, self._memory.pool)
        if decision.loading:
            self._blocked = False  # the loaded pages may be hit
        plan = StepPlan(
            step=self._counts.steps,
            admits=admits,
            rows=rows,
            shape=shape,
            least=decision.rules.least,
            heard=decision.rules.heard,
            patience=decision.rules.patience,
            saves=self._memory.saves(),
            demotions=demotions,
        )
        self._counts.steps += 1
        self._in_flight[plan.step] = decision.rows
        return plan

    def _seat(self, sequence: Sequence, hits: Hits, now: float) -> Admit:
        """Gives a waiting sequence a slot; its prefix hits are pinned already."""
        self._waiting.remove(sequence)
        if sequence.request.id in self._unadmitted:
            self._unadmitted.discard(sequence.request.id)
            self._gate.waits.admitted(sequence.forecast, now - sequence.request.arrival)
        self._drafts.begin(sequence)  # others may have as many drafts by now as it was given then
        loads = self._memory.seat(sequence, hits, self._counts.steps)
        cached = sequence.computed
        insort(self._running, sequence, key=attrgetter("order"))
        again = sequence.admitted is not None or sequence.output_len > 0
        self._counts.admitted(sequence, cached, again=again)
        if sequence.admitted is None:
            sequence.account.served += PROMPT_WEIGHT * (len(sequence.tokens) - cached)
            sequence.admitted = now
            sequence.cached_tokens = min(cached, sequence.prompt_len)
        return Admit(
            slot=sequence.slot,
            epoch=sequence.epoch,
            params=sequence.params,
            choice=sequence.choice,
            prompt_len=sequence.prompt_len,
            pages=tuple(sequence.pages),
            cached=tuple(sequence.tokens[:cached]),
            loads=loads,
            group=sequence.group,
        )

    # --- settling -------------------------------------------------------------------------------

    def settle(self, plan: StepPlan, result: StepResult, now: float) -> list[Output]:
        """Learns what a step committed. Raises `ValueError` for results out of order or shape."""
        if plan.step != next(iter(self._in_flight), None) or result.step != plan.step:
            raise ValueError(f"step {plan.step}, result {result.step}: not the oldest in flight")
        if len(result.rows) != len(plan.rows):
            raise ValueError(f"{len(result.rows)} results for {len(plan.rows)} rows")
        outputs = self.take_outputs()
        shape = shape_as_run(plan, result)
        size = self.config.page_size
        sequences = self._in_flight.pop(plan.step)
        self._gate.waits.settled(shape, result.seconds, now, busy=bool(self._in_flight))
        if not plan.copies:
            self.cost.observe(shape, result.seconds)
        for row, sequence, done in zip(plan.rows, sequences, result.rows, strict=True):
            if row is sequence.plain_row and (output := self._go_on(sequence, done)):
                outputs.append(output)  # nearly always; what follows comes to the same
                continue
            if sequence.epoch != row.epoch:
                continue  # ended or preempted since
            if done.error:
                outputs.append(self._end(sequence, FinishReason.ERROR, now, message=done.error))
                continue
            if row.chunk is not None:
                sequence.computed += len(row.chunk)
                if sequence.prompt_logprobs is not None:
                    sequence.prompt_logprobs += done.prompt_logprobs
            if row.samples:
                sequence.pending_min -= 1
                sequence.pending_max -= 1 + row.drafts
                if row.drafts:
                    self._judge(sequence, row, done)
                outputs.append(self._learn(sequence, done, now))
            elif sequence.computed - sequence.registered >= size:
                self._publish(sequence)
        self._drafts.settled(plan, result, now)
        self._counts.drafting(result.drafting)
        if self._memory.lift(plan.step):
            self._blocked = False
        return outputs

    def _judge(self, sequence: Sequence, row: Row, done: RowResult) -> None:
        """What became of a row's drafts."""
        self._drafts.learn(sequence, row, done)
        if done.proposed:
            accepted = len(done.tokens) - 1
            sequence.drafted += done.proposed
            sequence.accepted += accepted
            self._counts.drafted(done.proposed, accepted)

    def _go_on(self, sequence: Sequence, done: RowResult) -> Output | None:
        """Appends the token of a plain row if it is one that ends nothing; else changes nothing.

        Its first token has come before, for a plain row is launched after the last chunk.
        """
        new, tokens, request = done.tokens, sequence.tokens, sequence.request
        computed = len(tokens)
        if len(new) != 1 or new[0] in request.params.stop_token_ids or done.error:
            return None
        if computed + 1 >= sequence.limit:
            return None
        tokens.append(new[0])
        sequence.pending_min -= 1
        sequence.pending_max -= 1
        sequence.fed += 1
        sequence.computed = computed
        self._counts.generated_tokens += 1
        sequence.account.served += OUTPUT_WEIGHT
        if computed - sequence.registered >= self.config.page_size:
            self._publish(sequence)
        demoted = sequence.demoted
        return Output(request.id, sequence.choice, new, done.logprobs, None, None, demoted)

    def _learn(self, sequence: Sequence, done: RowResult, now: float) -> Output:
        """Appends what a row committed and, where that ends the sequence, ends it.

        A stop token counts as generated, but neither it nor its log-probability is output.
        """
        tokens = done.tokens
        kept, reason, stop_token = sequence.learn(tokens)
        stopped = stop_token is not None
        self._counts.generated_tokens += kept + stopped
        sequence.account.served += OUTPUT_WEIGHT * (kept + stopped)
        if sequence.computed - sequence.registered >= self.config.page_size:
            self._publish(sequence)
        if sequence.first_token is None:
            sequence.first_token = now
            self._release_siblings(sequence)
        prompt_logprobs = None
        if sequence.prompt_logprobs is not None:
            prompt_logprobs = sequence.take_prompt_logprobs()
        finish = None
        if reason is not None:
            finish = self._finish(
                sequence, reason, now, sequence.output_len + stopped, stop_token=stop_token
            )
        logprobs = done.logprobs
        if kept < len(tokens):
            tokens, logprobs = tokens[:kept], logprobs[:kept]
        return Output(
            *(sequence.request.id, sequence.choice, tokens, logprobs, prompt_logprobs, finish),
            demoted=sequence.demoted,
        )

    def _publish(self, sequence: Sequence) -> None:
        if sequence.registered < sequence.prompt_len:
            self._blocked = False  # somebody waiting may share the prompt
        self._memory.publish(sequence)

    def _release_siblings(self, leader: Sequence) -> None:
        """Lets the choices parked behind this one run: all, now that it has computed the prompt;
        or, where it ended before it could, the next one in its place."""
        computed = leader.first_token is not None
        for sibling in self._waiting.unpark(leader.request.id, None if computed else 1):
            sibling.chain = leader.chain.fork(leader.prompt_len // self.config.page_size)
            self._blocked = False

    # --- leaving --------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue. Its registered pages stay cached, and go to host memory if they are
        evicted and that pays: resuming is mostly a prefix hit."""
        if swap_pays(self.cost, sequence.registered, self.config.page_size):
            self._memory.keep(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self._counts.preemptions += 1
        self.policy.reserve.evicted()
        self._waiting.push(sequence)

    def _demote(self, sequence: Sequence, place: int) -> Demotion:
        """Takes half of a page's bits. The first page of a sequence that it happens to tells the
        admission policy as much as if the sequence had been paused."""
        if not sequence.halves:
            self.policy.reserve.evicted()
        self._counts.pages_demoted += 1
        return self._memory.demote(sequence, place)

    def _release(self, sequence: Sequence) -> None:
        """Stops a running sequence; from here on its rows in flight are stale."""
        self._running.remove(sequence)
        self._memory.release(sequence, self._newest)
        self._blocked = False

    @property
    def _newest(self) -> int | None:
        """The newest step in flight."""
        return self._counts.steps - 1 if self._in_flight else None

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        completion_tokens: int | None = None,
        message: str = "",
    ) -> Output:
        """Ends a sequence from outside, without new tokens."""
        count = sequence.output_len if completion_tokens is None else completion_tokens
        finish = self._finish(sequence, reason, now, count, message=message)
        return Output(sequence.request.id, sequence.choice, finish=finish, demoted=sequence.demoted)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        completion_tokens: int,
        stop_token: int | None = None,
        message: str = "",
    ) -> Finish:
        """The one way out: takes the sequence from wherever it is and closes its account."""
        request = sequence.request
        if sequence.phase is Phase.RUNNING:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
            self._memory.forgo(sequence, self._newest)
            self._blocked = False
        if sequence.phase is not Phase.PARKED:
            self._release_siblings(sequence)
        sequence.phase = Phase.ENDED
        self.policy.lengths.ended(sequence, reason)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._gate.answers.add(completion_tokens)
        self.policy.reserve.finished()
        self._waiting.close(sequence, now)
        choices = self._requests[request.id]
        choices.remove(sequence)
        if not choices:
            del self._requests[request.id]
            self._unadmitted.discard(request.id)
        return sequence.finish(reason, now, completion_tokens, stop_token, message)

    # --- looking in -----------------------------------------------------------------------------

    def load(self) -> Load:
        return self._counts.load(
            len(self._running),
            self._waiting,
            self._memory,
            self._admission,
            self._gate.usual_wait(self._running, self._counts.steps),
            self._gate.waits,
        )

    def occupancy(self) -> Occupancy:
        """What the simulator looks at after every turn: of `load`, what costs nothing to know."""
        pool = self._memory.pool
        return Occupancy(
            (pool.total - pool.available) / pool.total,
            len(self._running),
            len(self._waiting),
            self._admission.reserved / pool.total,
            self._counts.preemptions,
        )

    def predicted_wait(self, request: Request, now: float) -> WaitForecast | None:
        """What a request that arrived now would have to expect; None while too little is known."""
        return self._gate.forecast(request, self._running, self._counts.steps, now)

    def check(self) -> None:
        """Raises `AssertionError` unless pages, slots and number lines add up. For tests."""
        self._memory.check(self._running, self._waiting, self._in_flight)
        self._waiting.check()
        for sequence in self._running:
            sequence.check(self.config.page_size)
        unfinished = sum(map(len, self._requests.values()))
        assert unfinished == len(self._running) + len(self._waiting), "a sequence is lost"
