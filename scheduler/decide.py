"""What the next step should be, decided on a scratch copy: nothing here changes anything.

`Decider.decide` reads sequences and the pool and fills a `Decision`; `Scheduler` commits it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from scheduler.admission import Admission
from scheduler.fair_share import PROMPT_WEIGHT, Account
from scheduler.gap import GapBudget, gap_target
from scheduler.memory import Hits, Memory
from scheduler.passing import Passing
from scheduler.policy import chunk_size, demotable, lane_size
from scheduler.profile import StepShape
from scheduler.request import SchedulerConfig
from scheduler.sequence import Sequence
from scheduler.spare import Room, Spare
from scheduler.speculation import NO_RULES, DraftPolicy, Rules
from scheduler.step_cost import StepCost
from scheduler.wait import Waits
from scheduler.waiting import WaitingQueue
from scheduler.work import Work

SCARCE = 2  # free pages for each sequence: with more, nobody looks who may take them
LATE = 1.4  # times the mean: pages are to last for an end that comes so late


@dataclass(slots=True)
class Decision:
    """Quantities of the pool as they will be, and what to do."""

    budget: int  # tokens left in the step, for chunks also by what `gap` leaves of its time
    free: int  # pages available; negative: a debt to be paid from `promised`
    promised: int  # pages the steps in flight give back when they settle
    running: list[Sequence]  # in order, but where `_retreat` says
    keep: int  # running[keep:] are preempted
    several: bool  # tenants share the room
    in_flight: bool  # pages released now are only promised
    halves: int  # of pages, free for what is demoted
    # By page that is demoted: whose it is, and its place there.
    demotions: dict[int, tuple[Sequence, int]] = field(default_factory=dict)
    dropped: Counter[int] = field(default_factory=Counter)  # references the victims give up
    stalled: int = 0  # live rows left out for want of a page
    pressure: bool = False  # somebody stalled or was preempted: admit nobody
    rules: Rules = NO_RULES
    context: int = 0  # positions that live rows read, summed, at most
    gap: GapBudget | None = None  # what the live rows' targets leave to chunks; None: no target
    spare: Spare | None = None  # what tenants leave each other; None: there is one only
    blocked: bool = False  # nobody can be admitted until pages, slots, hits or candidates come
    # Who gets a row, decodes first, and what each needs. None, by far the most common: it goes on
    # as it is, with no drafts and no new pages.
    rows: list[Sequence] = field(default_factory=list)
    work: list[Work | None] = field(default_factory=list)
    admits: list[tuple[Sequence, Hits]] = field(default_factory=list)
    loading: set[int] = field(default_factory=set)  # host pages that admissions load
    head: Sequence | None = None  # the first waiting sequence that did not fit
    overtakes: int = 0  # admissions past it
    prompts: list[Sequence] = field(default_factory=list)  # begun, and not yet in the step
    lane: int = 0  # tokens of the step that long prompts leave to short ones
    # Chunks of long prompts: whose, what they are given, how much of the prompt was fed before.
    long: list[tuple[Sequence, Work, int]] = field(default_factory=list)


class Decider:
    """The decision procedure: decodes, then chunks of admitted prompts, then admissions."""

    def __init__(
        self,
        config: SchedulerConfig,
        memory: Memory,
        drafts: DraftPolicy,
        admission: Admission,
        cost: StepCost,
        waits: Waits,
    ) -> None:
        self._config = config
        self._memory = memory
        self._pool = memory.pool
        self._drafts = drafts
        self._admission = admission
        self._cost = cost
        self._waits = waits
        self._passing = Passing(cost, waits, config.mtpot_target)

    def decide(
        self,
        running: list[Sequence],
        waiting: WaitingQueue,
        in_flight: bool,
        blocked: bool,
        now: float,
    ) -> Decision:
        """`running` is sorted by order; `blocked` as found by the last call, if nothing changed."""
        tenants = waiting.tenants(now)
        several = len(tenants) > 1
        running = running.copy() if several else running
        d = Decision(
            budget=self._config.max_step_tokens,
            free=self._pool.available,
            promised=self._pool.fenced,
            running=running,
            keep=len(running),
            several=several,
            in_flight=in_flight,
            halves=self._pool.free_halves,
            blocked=blocked,
        )
        joining = 0 if blocked else min(len(waiting), self._memory.free_slots)
        unread = waiting.tokens * joining // len(waiting) if joining else 0
        d.rules = self._drafts.plan(running, joining, unread)
        others = self._continue_live(d, running)
        admits = bool(waiting and self._memory.free_slots and not d.blocked and not d.pressure)
        if d.rows and (others or admits):
            self._limit_gap(d, running)
        if several and (others or admits):
            room = Room(
                self._config.max_num_seqs,
                self._pool.total,
                self._config.max_step_tokens,
                self._memory.max_len,
            )
            d.spare = Spare(room, tenants, running[: d.keep])
        d.lane = lane_size(d.budget, self._config.long_prefill_rows)
        if others:
            d.prompts = [s for s in running[: d.keep] if s.fed < len(s.tokens)]
            if several:
                d.prompts.sort(key=_served)
        if not (admits and several):
            self._continue_prompts(d)
        if admits:
            self._admit(d, running[: d.keep], waiting)
            self._continue_prompts(d)
        if d.long:
            self._widen(d)
        d.rows, d.work = self._passing.stay(d.rows, d.work, d.context, d.spare)
        return d

    def _continue_live(self, d: Decision, running: list[Sequence]) -> bool:
        """Rows for live sequences, in order, preempting from the end. True if others remain."""
        size, max_len = self._config.page_size, self._memory.max_len
        rows, work = d.rows, d.work
        spare = d.budget - len(running)  # drafts leave a token to every running sequence
        growing: int | None = None  # of the sequences, the first so many may take pages
        others = False
        context = 0
        for i, sequence in enumerate(running):
            if i >= d.keep:
                break  # it and all behind it are victims of somebody before
            length = len(sequence.tokens)
            if sequence.fed < length:
                others = True
                continue
            reach = length + sequence.pending_max  # it stands at this length at most
            if length + sequence.pending_min >= sequence.limit or reach > max_len:
                continue  # ends by what is in flight; or may, and has no position to go on
            k = sequence.drafts
            if k:
                k = max(0, min(k, spare, sequence.limit - reach - 1))
            need = -(-(reach + k) // size) - len(sequence.pages)
            if need <= 0 and not k:
                context += reach
                rows.append(sequence)
                work.append(None)
                continue
            # Drafts for the step after lie behind these, in pages that it will need anyway.
            ahead = max(min(k, sequence.limit - reach - k - 2), 0) if k and d.rules.ahead else 0
            if ahead:
                more = -(-(reach + k + 1 + ahead) // size) - len(sequence.pages)
                if more <= d.free:
                    need = more
                else:
                    ahead = 0
            if need > 0 and growing is None:
                growing = self._growing(d, running)
            waits = growing is not None and i >= growing
            if k and need > 0 and (waits or need > d.free):  # the first retreat: no drafts
                k = ahead = 0
                need = -(-reach // size) - len(sequence.pages)
            if need > 0:
                if waits:
                    d.pressure = True
                    d.stalled += 1
                    continue
                if need > d.free:
                    self._retreat(d, running, i + 1, need)
                stalled = need > d.free
                d.free -= need  # what a stalled row waits for is spoken for
                if stalled:
                    d.stalled += 1
                    continue
            else:
                need = 0
            context += reach
            spare -= k
            rows.append(sequence)
            work.append(Work(0, k, need, ahead))
        d.context = context
        d.budget = spare + len(running) - len(rows)
        return others

    def _growing(self, d: Decision, running: list[Sequence]) -> int:
        """How many of the sequences, in order, may take new pages: all, if these last until one of
        them is expected to end. Else as many as they last for, so that the first come to their end
        and give theirs back, instead of all being stuck and the last preempted.

        All as well, where the others would have to wait for too long.
        """
        count = len(running)
        if not self._patient(d) or d.free >= SCARCE * count:
            return count
        steps = self._admission.first_ends(running)
        if steps is None:
            return count
        paces = np.cumsum([sequence.pace for sequence in running])
        tokens = (d.free + d.promised) * self._config.page_size
        few_enough = LATE * steps * paces <= tokens
        target = gap_target(self._config.mtpot_target, running)
        if target is not None:
            context = sum(len(sequence.tokens) for sequence in running)
            seconds = self._cost.seconds(StepShape(count, count, context))
            few_enough &= 2 * steps * seconds <= target
        found = np.flatnonzero(few_enough)
        return int(found[-1]) + 1 if found.size else count

    def _retreat(self, d: Decision, running: list[Sequence], first: int, need: int) -> None:
        """Demotes pages or preempts running[first:], from the end, until the one before them finds
        the `need` pages it lacks available or promised.

        All choices of a request go together: they share the pages of the prompt, which are freed
        by the last of them only. With several tenants, those of the one that was served most come
        last from here on, whatever priority it gave them; `running` is a copy then.

        While a step is in flight a victim's pages are fenced. They count as promised, and the row
        in need stalls until the fence lifts; preempting on would empty the batch for nothing.

        Nobody is preempted or stalls as long as it is enough to demote pages, its own last of all.
        Nor is preempted who has just lost some, lest a page is given up twice: the row stalls. And
        for its equals only the first in order preempts; who comes later waits for it to do so, or
        for an end, while there are rows that can go on.
        """
        d.pressure = True
        if d.several:
            running[first : d.keep] = sorted(running[first : d.keep], key=_served)
        while need > d.free + d.promised:
            if self._demote(d, running[first - 1 : d.keep], need - d.free - d.promised):
                return
            request = running[d.keep - 1].request
            equals = request.priority <= running[first - 1].request.priority
            if d.rows and equals and self._patient(d):
                return
            loses = any(sequence.request is request for sequence, _ in d.demotions.values())
            if loses or d.keep == first:
                return
            while d.keep > first and running[d.keep - 1].request is request:
                d.keep -= 1
                freed = self._pool.freed_by_dropping(running[d.keep].pages, d.dropped)
                if d.in_flight:
                    d.promised += freed
                else:
                    d.free += freed

    def _patient(self, d: Decision) -> bool:
        """Whether rows wait for pages: not for another tenant's, nor where pages could be demoted,
        which would be the first one's own then."""
        return not d.several and self._config.demote_all_but is None

    def _demote(self, d: Decision, sequences: list[Sequence], short: int) -> bool:
        """Demotes pages, the last sequence's first, so that `short` more become available: one for
        each that finds a free half, one for two of the others. None, if there are not enough."""
        count = short + max(short - d.halves, 0)
        pages = list(islice(self._demotable(d, sequences), count))
        if len(pages) < count:
            return False
        d.demotions.update(pages)
        d.free += short
        d.halves = max(d.halves - short, 0)
        return True

    def _demotable(
        self, d: Decision, sequences: list[Sequence]
    ) -> Iterator[tuple[int, tuple[Sequence, int]]]:
        """What may be demoted, as in `Decision.demotions`; of each sequence the oldest first."""
        config = self._config
        if config.demote_all_but is None:
            return
        for sequence in reversed(sequences):
            for place in demotable(sequence.computed, config.demote_all_but, config.page_size):
                page = sequence.pages[place]
                if self._pool.demotable(page) and page not in d.demotions:
                    yield page, (sequence, place)

    def _limit_gap(self, d: Decision, running: list[Sequence]) -> None:
        """Leaves no more of the budget to chunks than the live rows can wait for.

        A page is read however long that takes. Where it would be too long beside drafts, there are
        none in this step.
        """
        target = gap_target(self._config.mtpot_target, d.rows)
        if target is None:
            return
        # Between two outputs of a stream lies more than a step, and none is quite as predicted.
        seconds = target / self._waits.longest_stretch - self._passing.gone
        page = self._config.page_size
        longest = max((s.fed for s in running[: d.keep] if s.fed < len(s.tokens)), default=0)
        live = self._live_shape(d)
        with_page = self._cost.seconds(live.with_chunk(page, longest))
        if live.tokens > live.rows and with_page > seconds:
            for work in d.work:
                if work is not None:
                    d.budget += work.drafts
                    work.drafts = work.ahead = 0
            live = self._live_shape(d)
        d.gap = GapBudget(self._cost, seconds, live, page)
        d.budget = d.gap.room(0, d.budget)

    def _live_shape(self, d: Decision) -> StepShape:
        """Of the step without chunks."""
        rows = len(d.rows)
        tokens = self._config.max_step_tokens - d.budget
        return StepShape(rows, rows, d.context).with_drafts(tokens - rows, rows)

    def _continue_prompts(self, d: Decision, served: float = math.inf) -> None:
        """Chunks for admitted sequences that have not caught up; they hold their pages already.

        Of tenants that were served no more than `served`: where there are several, those who wait
        and those whose prompts were begun take turns, or one's long prompts would be in the way of
        all that others bring.
        """
        done = 0
        for sequence in d.prompts:
            if d.budget <= 0 or sequence.account.served > served:
                break
            self._feed(d, sequence, sequence.fed, 0)
            done += 1
        del d.prompts[:done]

    def _feed(self, d: Decision, sequence: Sequence, fed: int, pages: int) -> bool:
        """A chunk of the budget for a sequence whose first `fed` tokens are fed, if it can be.

        Long prompts leave the lane to short ones, so a short prompt never waits for a long one to
        end; what stays unused of the lane is theirs after all, see `_widen`.
        """
        known = len(sequence.tokens)
        long = known - fed > d.lane
        budget = self._room(d, sequence, fed, d.budget - d.lane if long else d.budget)
        if budget <= 0:
            return False
        use = chunk_size(fed, known, budget, self._config.page_size)
        work = Work(0, 0, pages)
        self._use(d, sequence, work, fed, use)
        d.rows.append(sequence)
        d.work.append(work)
        if long:
            d.long.append((sequence, work, fed))
        return True

    def _widen(self, d: Decision) -> None:
        """Gives what is left of the budget to the long prompts, the first in order first."""
        for sequence, work, fed in d.long:
            known, before = len(sequence.tokens), work.tokens
            d.budget += before
            if d.gap is not None:
                d.gap.remove(before, fed)
            if d.spare is not None:
                d.spare.feed(sequence.account, -before)
            # Another one of its tenant may have got more than the part that counts for this one.
            budget = max(self._room(d, sequence, fed, d.budget), before)
            use = chunk_size(fed, known, budget, self._config.page_size)
            self._use(d, sequence, work, fed, use)

    def _room(self, d: Decision, sequence: Sequence, fed: int, budget: int) -> int:
        """How much of the budget a chunk after `fed` tokens may have."""
        if d.gap is not None and fed:
            budget = d.gap.room(fed, budget)
        if d.spare is not None:
            budget = d.spare.room(sequence.account, budget, _charged(sequence))
        return budget

    def _use(self, d: Decision, sequence: Sequence, work: Work, fed: int, tokens: int) -> None:
        """The chunk gets so many tokens."""
        work.tokens = tokens
        d.budget -= tokens
        if d.gap is not None:
            d.gap.add(tokens, fed)
            d.budget = d.gap.room(0, d.budget)
        if d.spare is not None:
            ends = fed + tokens == len(sequence.tokens)
            d.spare.feed(sequence.account, tokens, _charged(sequence), ends)

    def _admit(self, d: Decision, running: list[Sequence], waiting: WaitingQueue) -> None:
        """Waiting sequences, in order, while slots, pages, budget and the forecast allow.

        A sequence gets the pages of all its known tokens at once, so a prompt that was begun is
        never short of pages. Behind a head that does not fit, `lookahead` others are tried, and
        no more than that ever overtake it; nor does a tenant that was served more than the longest
        sequence ahead of the head's, or large heads would make it a stream of small favours.

        With several tenants, those with much leave room to those with little, see `Spare`.
        """
        config, pool = self._config, self._pool
        spare = d.spare
        slots = pages = 0  # to be left
        pinned: set[int] = set()
        self._admission.survey(running)
        tries = 0  # behind the first that was not admitted
        passed = False
        withheld: set[Account] = set()  # those that have to leave room to others
        later = False  # somebody has to wait for the next step only
        for sequence in waiting.turns(withheld):
            if sequence.account in withheld:
                break  # it is the only one that waits
            if d.prompts:
                self._continue_prompts(d, sequence.account.served)
            if d.budget <= 0 or len(d.admits) == self._memory.free_slots:
                return
            if passed:
                tries += 1
                if tries > config.lookahead:
                    break
            if d.head is not None and (
                d.head.overtaken + d.overtakes >= config.lookahead
                or sequence.account.served - d.head.account.served > self._memory.max_len
            ):
                break
            hits = self._memory.hits(sequence)
            if not d.loading.isdisjoint(hits.loads):
                passed = later = True  # in the next step it shares what this one loads
                continue
            on_device, total = hits.on_device, -(-len(sequence.tokens) // config.page_size)
            cost = total - len(on_device) + pool.cost_of_pinning(on_device, pinned)
            if spare is not None:
                slots, pages = spare.beside(sequence.account, total)
            if slots >= self._memory.free_slots - len(d.admits):
                withheld.add(sequence.account)
                continue
            if cost > d.free - pages or not self._admission.fits(sequence, on_device, pages):
                if pages:
                    withheld.add(sequence.account)
                else:
                    d.head = d.head or sequence
                    passed = True
                continue
            cached = len(hits.pages)
            if not self._feed(d, sequence, cached * config.page_size, total - cached):
                passed = later = True  # long, behind long ones: its turn comes after theirs
                continue
            d.overtakes += d.head is not None
            d.free -= cost
            pinned.update(on_device)
            d.loading.update(hits.loads)
            d.admits.append((sequence, hits))
            self._admission.admit(sequence, on_device)
            if spare is not None:
                spare.admit(sequence.account, total)
        d.blocked = (d.head is not None or bool(withheld)) and not later


def _served(sequence: Sequence) -> int:
    return sequence.account.served


def _charged(sequence: Sequence) -> int:
    """What its tenant was charged for its prompt already."""
    if sequence.admitted is None:
        return 0
    return PROMPT_WEIGHT * (sequence.prompt_len - sequence.cached_tokens)
