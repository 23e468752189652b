"""`Gate`: overload is answered at arrival. Who would wait in vain is told when to come back."""

from __future__ import annotations

from scheduler.admission import Policy
from scheduler.backlog import Work, work_of
from scheduler.memory import Memory
from scheduler.profile import StepShape
from scheduler.request import Refusal, Request, SchedulerConfig
from scheduler.sequence import Sequence, WaitForecast
from scheduler.step_cost import StepCost
from scheduler.wait import Batch, Releases, Waits
from scheduler.waiting import WaitingQueue

MIN_RETRY_AFTER, MAX_RETRY_AFTER = 1.0, 60.0  # seconds
# A batch is summed up anew after a step, or a row that came or went, for each so many of its rows.
_ROWS_PER_CHANGE = 32
KNOWN_ENDS = 20  # before so many answers nothing is predicted: a cold start refuses nobody
_USUAL_STEPS = 8  # a gauge looked at by people need not be newer
_USUAL = 0.05  # smoothing of what a usual newcomer brings, per arrival


class Overloaded(Exception):  # noqa: N818, a state of the queue
    """The request is not taken now; a request like it should be after `retry_after` seconds."""

    def __init__(self, reason: Refusal, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Gate:
    """Decides at arrival who may wait, by the length of the queue and by the predicted wait."""

    def __init__(
        self,
        config: SchedulerConfig,
        memory: Memory,
        waiting: WaitingQueue,
        cost: StepCost,
        policy: Policy,
    ) -> None:
        self._config = config
        self._memory = memory
        self._waiting = waiting
        self._policy = policy
        self._cost = cost
        self.waits = Waits(cost)
        self.answers = waiting.backlog.answers
        self._ends_at_renewal = 0
        self._batch: Batch | None = None
        self._batch_step = 0
        self._usual = Work()
        self._usual_wait = 0.0
        self._usual_step = -_USUAL_STEPS
        self._usual_waiting = 0  # at that step
        self._next_turn = 0.0  # when those refused so far should all have been taken

    def enter(
        self, request: Request, running: list[Sequence], step: int, now: float
    ) -> WaitForecast | None:
        """What the request has to expect; None while nothing is known. Raises `Overloaded`.

        Whoever finds the queue empty passes whatever the bounds, and whoever would not wait
        passes whatever its targets.
        """
        forecast = self.forecast(request, running, step, now)
        self._check_queue(request, forecast, now)
        if forecast is not None and forecast.admission_s > 0.0:
            self._check_targets(request, forecast, now)
        self._learn_usual(self._work(request))
        return forecast

    def forecast(
        self, request: Request, running: list[Sequence], step: int, now: float
    ) -> WaitForecast | None:
        """When a request that arrived now would be admitted and have its first token."""
        if not self._known:
            return None
        self._renew()
        config, own = self._config, self._work(request)
        ahead = self._waiting.backlog.ahead_of(
            request, now, config.priority_ageing, self._waiting.served
        )
        return self._predict(ahead, own, running, step)

    def usual_wait(self, running: list[Sequence], step: int) -> float:
        """Seconds until a usual request that arrived now would be admitted; some steps old."""
        if not self._known or not (self._waiting or self._usual.sequences):
            return 0.0
        waiting = len(self._waiting)
        changed = abs(waiting - self._usual_waiting) * _USUAL_STEPS > waiting
        if changed or step >= self._usual_step + _USUAL_STEPS:
            self._usual_step, self._usual_waiting = step, waiting
            forecast = self._predict(self._waiting.backlog.total(), self._usual, running, step)
            self._usual_wait = forecast.admission_s
        return self._usual_wait

    @property
    def _known(self) -> bool:
        return self.waits.known and self.answers.ends >= KNOWN_ENDS

    def _predict(self, ahead: Work, own: Work, running: list[Sequence], step: int) -> WaitForecast:
        batch = self._summed_up(running, step)
        forecast = self.waits.forecast(batch, ahead, own)
        pages = -(-own.prompt // self._config.page_size)
        fits = self._memory.free_slots > 0 and pages <= self._memory.pool.available - len(running)
        if fits and not self._waiting:
            return WaitForecast(0.0, forecast.first_token_s - forecast.admission_s)
        return forecast

    def _check_queue(self, request: Request, forecast: WaitForecast | None, now: float) -> None:
        waiting, config = self._waiting, self._config
        if not waiting:
            return
        brings = len(request.prompt) * request.n
        if len(waiting) >= config.max_queued_requests:
            reason, share = Refusal.QUEUE_FULL, request.n / len(waiting)
            message = f"{len(waiting)} sequences are waiting"
        elif config.max_queued_tokens and waiting.tokens + brings > config.max_queued_tokens:
            excess = waiting.tokens + brings - config.max_queued_tokens
            reason, share = Refusal.QUEUE_TOKENS, excess / waiting.tokens
            message = f"{waiting.tokens} tokens are waiting"
        else:
            return
        seconds = 0.0 if forecast is None else forecast.admission_s * min(share, 1.0)
        raise Overloaded(reason, message, self._turn(seconds, request, forecast, now))

    def _check_targets(self, request: Request, forecast: WaitForecast, now: float) -> None:
        target = request.ttft_target or self._config.ttft_target
        margin = forecast.admission_s * self.waits.margin
        admission, first = forecast.admission_s + margin, forecast.first_token_s + margin
        late: list[tuple[float, Refusal, str]] = []
        if target is not None:
            late.append((first - target, Refusal.TTFT, "the first token was wanted in"))
        if request.deadline is not None:
            late.append((first - (request.deadline - now), Refusal.DEADLINE, "its time limit is"))
        if request.queue_deadline is not None:
            over = admission - (request.queue_deadline - now)
            late.append((over, Refusal.DEADLINE, "its time limit in the queue is"))
        over, reason, what = max(late, default=(0.0, Refusal.TTFT, ""))
        if over > 0.0:
            until = (admission if "queue" in what else first) - over
            message = f"the request would start in about {first:.1f} s, but {what} {until:.1f} s"
            raise Overloaded(reason, message, self._turn(over, request, forecast, now))

    def _turn(
        self, seconds: float, request: Request, forecast: WaitForecast | None, now: float
    ) -> float:
        """Seconds until the refused request would be taken: not all who were refused at once can
        come back at once, so each gets its turn after those refused before it."""
        pace = 0.0
        if forecast is not None and self._waiting:
            pace = forecast.admission_s / len(self._waiting)
        self._next_turn = max(self._next_turn, now + seconds) + pace * request.n
        return min(max(self._next_turn - now, MIN_RETRY_AFTER), MAX_RETRY_AFTER)

    def _work(self, request: Request) -> Work:
        """Of the newcomer's first choice, with the answer as long as answers were lately."""
        length = len(request.prompt)
        limit = min(request.params.max_tokens, self._memory.max_len - length)
        return work_of(length, length, max(min(self.answers.mean, limit), 1.0), 1.0)

    def _renew(self) -> None:
        """Sums the queue up again once enough answers have ended to change what is expected."""
        backlog, ends = self._waiting.backlog, self.answers.ends
        if ends - self._ends_at_renewal >= max(4, len(backlog) // 8):
            self._ends_at_renewal = ends
            backlog.renew()

    def _learn_usual(self, work: Work) -> None:
        for name in Work.__slots__:
            old, new = getattr(self._usual, name), getattr(work, name)
            rate = _USUAL if self._usual.sequences else 1.0
            setattr(self._usual, name, old + rate * (new - old))

    def _summed_up(self, running: list[Sequence], step: int) -> Batch:
        """What runs; counted again when it may have changed much."""
        batch, age = self._batch, step - self._batch_step
        changed = len(running) if batch is None else abs(len(running) - batch.rows)
        if batch is not None and max(changed, age) * _ROWS_PER_CHANGE <= batch.rows:
            return batch
        # Memory is blocked by what the policy guesses, and given back when answers really end.
        guessed = sorted((max(s.guess - s.output_len, 0) / s.pace, len(s.tokens)) for s in running)
        trust, left_of = self.answers.trust, self.answers.left
        left = sorted((left_of(s, trust) / s.pace, len(s.tokens)) for s in running)
        pool = self._memory.pool
        reserve = self._policy.reserve.share(len(running))
        capacity = pool.total * self._config.page_size * (1.0 - reserve)
        context = sum(known for _, known in left)
        peak = peak_of(guessed, context)
        grown = peak / context if context else 1.0  # what they hold, at their common peak
        self._batch = Batch(
            rows=len(running),
            context=context,
            chunk=self._chunk(len(running), context),
            prompt=sum(len(s.tokens) - s.fed for s in running),
            slots=Releases(self._memory.free_slots, ((steps, 1.0) for steps, _ in left)),
            memory=Releases(capacity - peak, ((t, known * grown) for t, known in left)),
        )
        self._batch_step = step
        return self._batch

    def _chunk(self, rows: int, context: int) -> int:
        """Prompt tokens of a step beside so many live rows, the server's gap target considered."""
        config = self._config
        room = max(config.max_step_tokens - rows, 1)
        if config.mtpot_target is None or not rows:
            return room
        seconds = config.mtpot_target / self.waits.longest_stretch
        live = StepShape(rows, rows, context)
        within = self._cost.tokens_within(seconds, live, context // rows, room)
        return min(room, max(within, config.page_size))


def peak_of(left: list[tuple[float, int]], context: float) -> float:
    """Most positions held at once if nobody joins: by steps to the end and positions held now,
    ascending, which are `context` together. Each sequence grows by one a step."""
    peak, alive = context, len(left)
    for steps, known in left:
        peak = max(peak, context + alive * steps)
        context -= known
        alive -= 1
    return peak
