"""What the next step should be, decided on a scratch copy: nothing here changes anything.

`Decider.decide` reads sequences and the pool and fills a `Decision`; `Scheduler` commits it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.pages import PagePool
from scheduler.policy import DraftCap, Room, chunk_size
from scheduler.request import SchedulerConfig
from scheduler.sequence import Sequence
from scheduler.waiting import WaitingQueue

PrefixHits = Callable[[Sequence], list[int]]


@dataclass(slots=True)
class Work:
    """One row to be, before its pages and slot have names."""

    sequence: Sequence
    tokens: int  # of the chunk; 0 for a live row
    drafts: int
    pages: int  # new ones


@dataclass(slots=True)
class Decision:
    """Quantities of the pool as they will be, and what to do."""

    budget: int  # tokens left in the step
    free: int  # pages available; negative: a debt to be paid from `promised`
    promised: int  # pages the steps in flight give back when they settle
    keep: int  # running[keep:] are preempted
    in_flight: bool  # pages released now are only promised
    pressure: bool = False  # somebody stalled or was preempted: admit nobody
    blocked: bool = False  # nobody can be admitted until pages, slots, hits or candidates come
    work: list[Work] = field(default_factory=list)  # decodes first
    admits: list[tuple[Sequence, list[int]]] = field(default_factory=list)  # with prefix hits
    head: Sequence | None = None  # the first waiting sequence that did not fit
    overtakes: int = 0  # admissions past it


class Decider:
    """The decision procedure: decodes, then chunks of admitted prompts, then admissions."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        hits: PrefixHits,
        drafts: DraftCap,
        room: Room,
        max_len: int,
    ) -> None:
        self._config = config
        self._pool = pool
        self._hits = hits
        self._drafts = drafts
        self._room = room
        self._max_len = max_len

    def decide(
        self,
        running: list[Sequence],
        waiting: WaitingQueue,
        slots: int,
        in_flight: bool,
        blocked: bool,
    ) -> Decision:
        """`running` is sorted by order; `slots` are free; `blocked` as found by the last call."""
        d = Decision(
            budget=self._config.max_step_tokens,
            free=self._pool.available,
            promised=self._pool.fenced,
            keep=len(running),
            in_flight=in_flight,
            blocked=blocked,
        )
        if self._continue_live(d, running):
            self._continue_prompts(d, running)
        if slots and not d.blocked and not d.pressure:
            self._admit(d, waiting, slots)
        return d

    def _continue_live(self, d: Decision, running: list[Sequence]) -> bool:
        """Rows for live sequences, in order, preempting from the end. True if others remain."""
        size, drafts = self._config.page_size, self._drafts
        spare = d.budget - len(running)  # drafts leave a token to every running sequence
        others = False
        i = 0
        while i < d.keep:
            sequence = running[i]
            i += 1
            length = len(sequence.tokens)
            if sequence.fed < length:
                others = True
                continue
            reach = length + sequence.pending_max  # it stands at this length at most
            if length + sequence.pending_min >= sequence.limit or reach > self._max_len:
                continue  # ends by what is in flight; or may, and has no position to go on
            k = min(drafts(sequence), spare, sequence.limit - reach - 1)
            if k < 0:
                k = 0
            need = -(-(reach + k) // size) - len(sequence.pages)
            if need > 0:
                if k and need > d.free:  # the first retreat: no drafts
                    k = 0
                    need = max(0, -(-reach // size) - len(sequence.pages))
                if need > d.free:
                    self._retreat(d, running, i, need)
                stalled = need > d.free
                d.free -= need  # what a stalled row waits for is spoken for
                if stalled:
                    continue
            else:
                need = 0
            spare -= k
            d.budget -= 1 + k
            d.work.append(Work(sequence, 0, k, need))
        return others

    def _retreat(self, d: Decision, running: list[Sequence], first: int, need: int) -> None:
        """Preempts running[first:] from the end until `need` pages are available or promised.

        While a step is in flight a victim's pages are fenced. They count as promised, and the row
        in need stalls until the fence lifts; preempting on would empty the batch for nothing.
        """
        d.pressure = True
        dropped: Counter[int] = Counter()
        for victim in running[d.keep :]:
            self._pool.freed_by_dropping(victim.pages, dropped)
        while need > d.free + d.promised and d.keep > first:
            d.keep -= 1
            freed = self._pool.freed_by_dropping(running[d.keep].pages, dropped)
            if d.in_flight:
                d.promised += freed
            else:
                d.free += freed

    def _continue_prompts(self, d: Decision, running: list[Sequence]) -> None:
        """Chunks for admitted sequences that have not caught up; they hold their pages already."""
        for sequence in running[: d.keep]:
            known = len(sequence.tokens)
            if sequence.fed < known and d.budget > 0:
                use = chunk_size(sequence.fed, known, d.budget, self._config.page_size)
                d.budget -= use
                d.work.append(Work(sequence, use, 0, 0))

    def _admit(self, d: Decision, waiting: WaitingQueue, slots: int) -> None:
        """Waiting sequences, in order, while slots, pages and budget last.

        A sequence gets the pages of all its known tokens at once, so a prompt that was begun is
        never short of pages. Behind a head that does not fit, `lookahead` others are tried, and
        no more than that ever overtake it.
        """
        config, pool = self._config, self._pool
        size = config.page_size
        pinned: set[int] = set()
        behind = 0  # tried since the head did not fit
        for sequence in waiting:
            if d.budget <= 0 or len(d.admits) == slots:
                return
            if d.head is not None:
                behind += 1
                if max(behind - 1, d.head.overtaken + d.overtakes) >= config.lookahead:
                    break
            known = len(sequence.tokens)
            hits = self._hits(sequence)
            need = -(-known // size) - len(hits)
            cost = need + pool.cost_of_pinning(hits, pinned)
            if not self._room(cost, d.free, d.keep + len(d.admits)):
                d.head = d.head or sequence
                continue
            if d.head is not None:
                d.overtakes += 1
            pinned.update(hits)
            use = chunk_size(len(hits) * size, known, d.budget, size)
            d.free -= cost
            d.budget -= use
            d.admits.append((sequence, hits))
            d.work.append(Work(sequence, use, 0, need))
        d.blocked = d.head is not None
