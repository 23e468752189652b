"""`Scheduler`: who runs in the next step, on which pages, and what a settled step has meant.

    add ──▶ waiting ──plan──▶ running ──settle──▶ ended        abort and deadlines end anyone
               ▲                 │
               └──── preempt ────┘

`plan` decides on a scratch copy (`decide.py`), then commits once. `settle` is the only place that
learns tokens. Several plans may be in flight; they settle in the order they were made.

One total order rules all queues (`policy.order_of`): running sequences are served in it, victims
are taken from its end. So the first in order is never preempted and always advances, whatever the
memory, and nothing can live-lock.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter, deque
from dataclasses import dataclass
from operator import attrgetter

from scheduler.decide import Decider, Decision
from scheduler.pages import PagePool
from scheduler.plan import Admit, Row, RowResult, StepPlan, StepResult
from scheduler.policy import DraftCap, Room, current_room, no_drafts, order_of
from scheduler.prefix import HashChain, PrefixIndex, chain_root
from scheduler.request import Finish, FinishReason, Load, Output, Request, SchedulerConfig
from scheduler.sequence import Phase, Sequence
from scheduler.waiting import WaitingQueue


class QueueFull(Exception):  # noqa: N818, a state of the queue
    """Too many sequences are waiting already."""


class ContextTooLong(ValueError):  # noqa: N818, a fact about the prompt
    """The prompt leaves no room for a single token, in the context or in the pool."""


@dataclass(slots=True)
class _Counts:
    """Counters since start, see `Load`."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0


class Scheduler:
    """First-come admission by current room, mixed chunked prefill, preemption by recompute.

    `drafts` caps each live row's draft slots; `room` is the admission test.
    """

    def __init__(
        self, config: SchedulerConfig, drafts: DraftCap = no_drafts, room: Room = current_room
    ) -> None:
        self.config = config
        self._index = PrefixIndex()
        self._pool = PagePool(config.num_pages, self._index)
        # Positions one sequence may ever use: alone in the pool it must be able to finish.
        self._max_len = min(config.max_model_len, self._pool.total * config.page_size)
        self._decider = Decider(config, self._pool, self._hits, drafts, room, self._max_len)
        self._requests: dict[str, list[Sequence]] = {}  # the unfinished choices
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # sorted by order
        self._slots = deque(range(1, config.max_num_seqs + 1))
        self._fenced_slots: dict[int, list[int]] = {}  # by the step that must settle
        self._in_flight: dict[int, list[Sequence]] = {}  # by step, oldest first: one a row
        self._deadlines: list[tuple[float, str]] = []  # a heap of request ids; ended ones linger
        self._outputs: list[Output] = []  # ends decided by add and plan, not yet handed out
        self._blocked = False  # see Decision.blocked
        self._counts = _Counts()
        self._next_step = 0
        self._next_epoch = 1
        self._next_serial = 0

    # --- requests come and go -------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queues a request.

        The choices of one request wait for the first to compute the prompt, then share its pages.
        Raises `QueueFull`; `ContextTooLong` for what could never run; `ValueError` for an id that
        is in use.
        """
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        if len(request.prompt) + 1 > self._max_len:
            raise ContextTooLong(
                f"the prompt has {len(request.prompt)} tokens, at most {self._max_len - 1} fit"
            )
        if len(self._waiting) >= self.config.max_queued_requests:
            raise QueueFull(f"{len(self._waiting)} sequences are waiting")
        self._requests[request.id] = choices = self._sequences(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        self._blocked = False
        shares = self.config.enable_prefix_cache and len(request.prompt) > self.config.page_size
        leader: Sequence | None = None
        for sequence in list(choices):
            if leader is not None and shares:
                self._waiting.park(sequence)
            else:
                self._waiting.push(sequence)
            if len(sequence.tokens) >= sequence.limit:  # it was complete before a restart
                self._outputs.append(self._end(sequence, FinishReason.LENGTH, now))
            else:
                leader = leader or sequence

    def _sequences(self, request: Request) -> list[Sequence]:
        config, params = self.config, request.params
        root = chain_root(
            config.hash_root, request.cache_salt, request.adapter.encode(), request.tenant.encode()
        )
        sequences: list[Sequence] = []
        for choice in range(request.n):
            produced = request.produced[choice] if request.produced else ()
            # One choice brings the prompt's log-probabilities, and not again after a restart.
            wanted = params.prompt_logprobs is not None and choice == 0 and not produced
            sequences.append(
                Sequence(
                    request=request,
                    choice=choice,
                    tokens=[*request.prompt, *produced],
                    order=order_of(request, self._next_serial, config.priority_ageing),
                    limit=min(len(request.prompt) + params.max_tokens, self._max_len),
                    chain=HashChain(root, config.page_size),
                    prompt_logprobs=[None] if wanted else None,
                )
            )
            self._next_serial += 1
        return sequences

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
            _, request_id = heapq.heappop(self._deadlines)
            for late in list(self._requests.get(request_id, ())):
                end = self._end(late, FinishReason.ABORT, now, message="deadline exceeded")
                self._outputs.append(end)
        if not self._requests:
            return None
        decision = self._decider.decide(
            self._running, self._waiting, len(self._slots), bool(self._in_flight), self._blocked
        )
        return self._commit(decision, now)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Pages of the longest cached prefix; the last token is always computed, for its logits.

        Prompt log-probabilities need the logits of every position, so they bypass the cache.
        """
        if not self.config.enable_prefix_cache or sequence.prompt_logprobs is not None:
            return []
        pages = (len(sequence.tokens) - 1) // self.config.page_size
        return self._index.match(sequence.chain, sequence.tokens, pages)

    def _commit(self, decision: Decision, now: float) -> StepPlan | None:
        """Makes a decision real. All hits are pinned before any page is taken, so that none is
        evicted for another row of the same step."""
        self._blocked = decision.blocked
        for victim in self._running[decision.keep :]:
            self._preempt(victim)
        if decision.head is not None:
            decision.head.overtaken += decision.overtakes
        for _, hits in decision.admits:
            self._pool.pin(hits)
        admits = tuple([self._seat(sequence, hits, now) for sequence, hits in decision.admits])
        if not decision.work:
            return None
        rows: list[Row] = []
        sequences: list[Sequence] = []
        for work in decision.work:
            sequence, drafts = work.sequence, work.drafts
            new: tuple[int, ...] = ()
            if work.pages:
                new = self._pool.take(work.pages)
                sequence.pages += new
            if work.tokens:
                row = self._chunk(sequence, work.tokens, new)
            elif new or drafts:
                row = Row(sequence.slot, sequence.epoch, None, True, drafts, None, new)
            else:
                row = sequence.plain_row
            if row.samples:
                sequence.pending_min += 1
                sequence.pending_max += 1 + drafts
            rows.append(row)
            sequences.append(sequence)
        step = self._next_step
        self._next_step += 1
        self._in_flight[step] = sequences
        return StepPlan(step, admits, tuple(rows))

    def _chunk(self, sequence: Sequence, use: int, new: tuple[int, ...]) -> Row:
        tokens, start, end = sequence.tokens, sequence.fed, sequence.fed + use
        sequence.fed = end
        reaches = end == len(tokens)
        following = None if reaches or sequence.prompt_logprobs is None else tokens[end]
        chunk = tuple(tokens[start:end])
        return Row(sequence.slot, sequence.epoch, chunk, reaches, 0, following, new)

    def _seat(self, sequence: Sequence, hits: list[int], now: float) -> Admit:
        """Gives a waiting sequence a slot; its prefix hits are pinned already."""
        self._waiting.remove(sequence)
        cached = len(hits) * self.config.page_size
        sequence.enter(self._slots.popleft(), self._next_epoch, hits, cached)
        self._next_epoch += 1
        insort(self._running, sequence, key=attrgetter("order"))
        counts = self._counts
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.cached_tokens = min(cached, sequence.prompt_len)
            counts.prompt_tokens += 0 if sequence.choice else sequence.prompt_len
            if sequence.prompt_logprobs is None:
                counts.prefix_queries += len(sequence.tokens)
                counts.prefix_hits += cached
        else:
            counts.recomputed_tokens += len(sequence.tokens) - cached
        return Admit(
            slot=sequence.slot,
            epoch=sequence.epoch,
            params=sequence.params,
            choice=sequence.choice,
            prompt_len=sequence.prompt_len,
            pages=tuple(hits),
            cached=tuple(sequence.tokens[:cached]),
        )

    # --- settling -------------------------------------------------------------------------------

    def settle(self, plan: StepPlan, result: StepResult, now: float) -> list[Output]:
        """Learns what a step committed. Raises `ValueError` for results out of order or shape."""
        if plan.step != next(iter(self._in_flight), None) or result.step != plan.step:
            raise ValueError(f"step {plan.step}, result {result.step}: not the oldest in flight")
        if len(result.rows) != len(plan.rows):
            raise ValueError(f"{len(result.rows)} results for {len(plan.rows)} rows")
        outputs = self.take_outputs()
        size = self.config.page_size
        sequences = self._in_flight.pop(plan.step)
        for row, sequence, done in zip(plan.rows, sequences, result.rows, strict=True):
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
                outputs.append(self._learn(sequence, done, now))
            elif sequence.computed - sequence.registered >= size:
                self._register(sequence)
        self._lift(plan.step)
        return outputs

    def _learn(self, sequence: Sequence, done: RowResult, now: float) -> Output:
        """Appends committed tokens up to the first that ends the sequence.

        A stop token ends it and counts as generated, but neither it nor its log-probability is
        part of the output. Before `min_tokens` it is a token like any other.
        """
        tokens, params = sequence.tokens, sequence.request.params
        prompt_len = len(sequence.request.prompt)
        reason: FinishReason | None = None
        stop_token: int | None = None
        kept = 0
        for token in done.tokens:
            if token in params.stop_token_ids and len(tokens) - prompt_len >= params.min_tokens:
                reason, stop_token = FinishReason.STOP, token
                break
            tokens.append(token)
            kept += 1
            if len(tokens) >= sequence.limit:
                reason = FinishReason.LENGTH
                break
        sequence.fed += kept
        if kept:
            # The newest token is known, but only the next step computes its keys and values.
            sequence.computed = len(tokens) - 1
            self._counts.generated_tokens += kept
        if sequence.computed - sequence.registered >= self.config.page_size:
            self._register(sequence)
        if sequence.first_token is None:
            sequence.first_token = now
            self._release_siblings(sequence)
        prompt_logprobs = sequence.take_prompt_logprobs()
        finish = None
        if reason is not None:
            generated = len(tokens) - prompt_len + (stop_token is not None)
            self._counts.generated_tokens += stop_token is not None
            finish = self._finish(sequence, reason, now, generated, stop_token=stop_token)
        whole = kept == len(done.tokens)
        return Output(
            sequence.request.id,
            sequence.choice,
            done.tokens if whole else done.tokens[:kept],
            done.logprobs if whole else done.logprobs[:kept],
            prompt_logprobs,
            finish,
        )

    def _register(self, sequence: Sequence) -> None:
        """Publishes the pages that settled results have filled; a rejected draft never stands in
        one, as it lies beyond `computed`."""
        if not self.config.enable_prefix_cache:
            return
        size = self.config.page_size
        if sequence.registered < sequence.prompt_len:
            self._blocked = False
        while sequence.computed - sequence.registered >= size:
            page = sequence.registered // size
            link = sequence.chain.link(page, sequence.tokens)
            self._index.register(sequence.pages[page], link)
            sequence.registered += size

    def _release_siblings(self, leader: Sequence) -> None:
        for sibling in self._waiting.unpark(leader.request.id):
            sibling.chain = leader.chain.fork(leader.prompt_len // self.config.page_size)
            self._blocked = False

    # --- leaving --------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue. Its registered pages stay cached: resuming is mostly a prefix hit."""
        self._release(sequence)
        sequence.preemptions += 1
        self._counts.preemptions += 1
        self._waiting.push(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Takes pages and slot from a running sequence, behind a fence while a step is in flight:
        that step may still write there."""
        self._running.remove(sequence)
        fence = self._next_step - 1 if self._in_flight else None
        self._pool.drop(sequence.pages, fence)
        if fence is None:
            self._slots.append(sequence.slot)
        else:
            self._fenced_slots.setdefault(fence, []).append(sequence.slot)
        sequence.leave()
        self._blocked = False

    def _lift(self, step: int) -> None:
        """What was released while this step was the newest in flight can be used again."""
        if self._pool.lift(step):
            self._blocked = False
        self._slots.extend(self._fenced_slots.pop(step, ()))

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
        return Output(sequence.request.id, sequence.choice, finish=finish)

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
            self._blocked = False
        if sequence.phase is not Phase.PARKED:
            self._release_siblings(sequence)
        sequence.phase = Phase.ENDED
        choices = self._requests[request.id]
        choices.remove(sequence)
        if not choices:
            del self._requests[request.id]
        return Finish(
            reason=reason,
            stop_token=stop_token,
            message=message,
            prompt_tokens=sequence.prompt_len,
            completion_tokens=completion_tokens,
            cached_tokens=sequence.cached_tokens,
            preemptions=sequence.preemptions,
            arrival=request.arrival,
            admitted=sequence.admitted,
            first_token=sequence.first_token,
            finished=now,
        )

    # --- looking in -----------------------------------------------------------------------------

    def load(self) -> Load:
        counts, pool = self._counts, self._pool
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.tokens,
            pages_total=pool.total,
            pages_held=pool.total - pool.available,
            pages_cached=pool.cached,
            steps=self._next_step,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            prefix_queries=counts.prefix_queries,
            prefix_hits=counts.prefix_hits,
            preemptions=counts.preemptions,
            recomputed_tokens=counts.recomputed_tokens,
        )

    def check(self) -> None:
        """Raises `AssertionError` unless pages, slots and number lines add up. For tests."""
        self._pool.check(Counter(page for s in self._running for page in s.pages))
        self._waiting.check()
        fenced = [slot for slots in self._fenced_slots.values() for slot in slots]
        slots = [*self._slots, *fenced, *(s.slot for s in self._running)]
        assert sorted(slots) == list(range(1, self.config.max_num_seqs + 1)), "slots"
        assert set(self._fenced_slots) <= set(self._in_flight), "a fence without a step"
        for sequence in self._running:
            sequence.check(self.config.page_size)
        unfinished = sum(map(len, self._requests.values()))
        assert unfinished == len(self._running) + len(self._waiting), "a sequence is lost"
