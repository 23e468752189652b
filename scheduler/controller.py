"""`Controller`: as many drafts for each sequence as pay, and none where none do.

How many are best if one option drafts for all is in `allocation.py`; here one of the options is
chosen, and what its answers rest on is kept up to date: how much is right (`acceptance.py`), what
verifying and drafting take (`verify_cost.py`, `draft_cost.py`), and when a drafter should stop
early (`calibration.py`). Where all that is wrong and drafts lose, `safety_net.py` ends them for a
while.

A draft model may also work ahead while the target verifies (`Row.ahead`). That is an option like
any other: verifying takes longer beside it, and drafting keeps the target waiting for less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from scheduler.acceptance import Acceptance
from scheduler.allocation import Allocation, Batch, Option, Promise, Verifying, allocate
from scheduler.calibration import Calibration
from scheduler.draft_cost import DraftCost
from scheduler.exploration import Exploration
from scheduler.foreseen import Foreseen
from scheduler.gap import gap_target
from scheduler.plan import DraftTime, Row, RowResult, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.rows import shape_as_run
from scheduler.safety_net import SafetyNet
from scheduler.sequence import Sequence
from scheduler.speculation import NO_RULES, Rules
from scheduler.step_cost import UNLIMITED, StepCost
from scheduler.verify_cost import Idle, VerifyCost

Floats = NDArray[np.float64]

EVERY = 8  # steps from one decision to the next while there are drafts, unless the batch changes
CHANGE = 2  # by more than one row of so many
# Steps from one probe to the next while there are none, later on; they are what may change that.
SELDOM = 32
PROMISING = 0.5  # a text written without drafts is news if so many would have been right
WATCH_EVERY = 16  # of so many steps one is looked at while nobody drafts
ALL_OPTIONS = 4  # decisions from one that looks at all options to the next
MARGIN = 1.02  # by how much drafting must be better than plain decoding to begin, or another option
REFRESH = 6  # plans without drafts, so that it stays known what plain steps take
GAP_AIM = 0.9  # of a gap target that a step with drafts may take
PROMPTS_SHARE = 0.5  # of what the target leaves beyond a plain step, while prompts are read
PROMPTS_RATE = 0.1  # smoothing of a step's prompt tokens, per step
PACE_RATE = 0.1  # smoothing of tokens a step, per step
PACES = 4  # of a token: paces are rounded, since a forecast takes time for each different one
VERIFY_POINTS = 8  # at which the time to verify is asked for
TWIN_AFTER = 1024  # plans after which a draft model works ahead, or does not, for a try; doubled
LONGEST_TWIN = 16 * TWIN_AFTER  # each time that changes nothing
TWIN_STEPS = 12  # that a try lasts


class Controller:
    """A `DraftPolicy` that follows what drafts were worth and what they took."""

    def __init__(
        self,
        options: Items[Option],
        names: Items[str],
        most: int,
        cost: StepCost,
        mtpot_target: float | None = None,
        beside: float = 1.0,
        step_tokens: int = UNLIMITED,
    ) -> None:
        """`options` must not be empty; `names` are the drafters' by number; `most` is the largest
        number of drafts in a row, `mtpot_target` the server's. `beside`: how many times as long
        verifying is taken to last while a draft model works ahead, until that was seen.
        `step_tokens`: that a step has at most."""
        if not options or most < 1:
            raise ValueError("a controller needs somebody who drafts, at least a token")
        self.options = tuple(options)
        self.most = most
        self.draft_costs = [DraftCost() for _ in options]
        orders = dict.fromkeys(option.drafters for option in options)
        self.acceptance = Acceptance(list(orders), most)
        self._computes = {option.drafters: option.computes for option in options}
        self._number = {(o.drafters, o.ahead): i for i, o in enumerate(options)}
        self._calibration = [Calibration() for _ in names]
        self._alone = {name: (number,) for number, name in enumerate(names)}
        self._steps = VerifyCost(cost, beside)
        self._mtpot_target = mtpot_target
        self._step_tokens = step_tokens
        self._prompts = 0.0  # tokens of prompts in a step, lately
        self._bound = False  # by a gap target, at the last decision,
        self._shared = False  # and prompts had a share of it
        # In use; at first the one that asks most drafters, for one of them may know.
        self._option = max(
            range(len(options)), key=lambda i: (len(options[i].drafters), not options[i].ahead)
        )
        self._twin_in = self._twin_after = TWIN_AFTER  # plans until the next try
        self._was_ahead = False  # drafts were made ahead while the last step was verified
        self._foreseen = Foreseen()
        self._usual = 0.0  # drafts of a sequence, on average
        self._rules = NO_RULES
        self._news = False  # that drafts may pay, while nobody drafts:
        self._unlike = False  # they do not for those who are there, but would for most others,
        self._arrived = False  # of whom one has come
        self._turn = 0  # whose turn it is to be probed
        self._probed: Sequence | None = None  # by the last plan
        self._decided_for = self._plans = self._decisions = 0
        self._unprobed = 0  # plans since the last probe, or decision
        self._net = SafetyNet()
        self._resting = 0  # plans without drafts to come
        self._exploration = Exploration(cold=cost.learns)
        self._unwatched = 0  # steps since one was looked at
        self._settled_at: float | None = None
        self._idle = Idle()
        self._asked = 0  # rows of the last step that had drafts
        self._drafting = False  # there are drafts in the last plan

    # --- the policy -----------------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        self._as_usual(sequence)
        self._arrived |= self._unlike and sequence.most_drafts > 0

    def _as_usual(self, sequence: Sequence) -> None:
        """Until it is live, and something can be said of it."""
        sequence.drafters = self._drafters(sequence, self._option)
        sequence.drafts = min(round(self._usual), sequence.most_drafts)

    def plan(self, running: list[Sequence], joining: int = 0, unread: int = 0) -> Rules:
        self._plans, self._unprobed = self._plans + 1, self._unprobed + 1
        rows = len(running)
        changed = abs(rows - self._decided_for) * CHANGE > self._decided_for or self._arrived
        probing = EVERY if self._exploration.early else SELDOM
        due = changed or self._plans >= (EVERY if self._usual or self._news else probing)
        if not (due or self._usual or self._drafting or self._resting):
            return NO_RULES  # nearly always, where drafts do not pay
        if self._steps.stale and not self._resting:
            # Beside prompts little would be seen of them; that can wait, but not for ever.
            reading = joining > 0 or any(s.fed < len(s.tokens) for s in running)
            if not reading or self._steps.stale > 1:
                self._resting = REFRESH
        if self._resting:
            self._resting -= 1
            self._drafting = False
            for sequence in running:
                sequence.drafts = 0
            return NO_RULES
        reading = joining > 0 or self._prompts >= 1.0
        if self._usual:
            due = due or (self._bound and reading != self._shared)
        elif self._probed is not None:
            self._probed.drafts, self._probed = 0, None
        if rows and due and self._steps.ready:
            live = [s for s in running if s.fed == len(s.tokens)]
            willing = [s for s in live if s.most_drafts]
            news = changed or self._news
            self._plans, self._decided_for = 0, rows
            self._arrived &= not willing  # its prompt is read first
            if willing and (self._usual or (news and self._exploration.decide())):
                self._unprobed, self._shared = 0, reading
                self._decide(live, self._soon(running, joining, unread))
                for sequence in running:
                    if sequence.fed < len(sequence.tokens):
                        self._as_usual(sequence)
            else:
                self._news = news
                if willing and self._unprobed >= probing:
                    self._unprobed = 0
                    self._probe(live, willing)
        self._drafting = any(sequence.drafts for sequence in running)
        return self._tried(self._rules)

    def learn(self, sequence: Sequence, row: Row, done: RowResult) -> None:
        if not done.proposed and done.drafter >= 0:
            return  # it is still catching up
        accepted = max(len(done.tokens) - 1, 0)
        self._news |= accepted > 0
        self.acceptance.learn(sequence, row.drafters, row.drafts, done.proposed, accepted)
        if done.confidence:
            self._calibration[done.drafter].learn(done.confidence, accepted)
            if len(row.drafters) > 1:  # it says something of that one alone, too
                alone = (done.drafter,)
                self.acceptance.learn(sequence, alone, row.drafts, done.proposed, accepted)
        if self._computes.get((done.drafter,), False):
            sequence.read_to = len(sequence.tokens)
        pace = sequence.exact_pace + PACE_RATE * (1 + accepted - sequence.exact_pace)
        sequence.exact_pace = pace
        sequence.pace = max(round(pace * PACES) / PACES, 1.0)

    def settled(self, plan: StepPlan, result: StepResult, now: float) -> None:
        drafting: list[tuple[int, ...]] = []
        if plan.shape.tokens > plan.shape.rows:
            drafting = [
                row.drafters
                for row, done in zip(plan.rows, result.rows, strict=True)
                if row.drafts and done.tokens
            ]
        asked, work = len(drafting), result.drafting
        if asked:
            served = sum(done.proposed > 0 for done in result.rows)
            if drafting.count(drafting[0]) == asked:
                self._observe(drafting[0], asked, plan, work)
            self._foreseen.settled(asked, served, work.foreseen if self._was_ahead else None)
        for shadow in result.shadows:
            self.acceptance.learn_from(shadow, self.most)
            self._news |= sum(shadow.right) >= PROMISING * len(shadow.right)
        self._was_ahead = work.ahead > 0
        calm = self._steps.ready and not (asked or self._asked or self._usual)
        if calm and self._unwatched + 1 < WATCH_EVERY:
            self._unwatched += 1
            self._settled_at = now
        else:
            self._watch(plan, result, now, asked)

    def _observe(
        self, drafters: tuple[int, ...], asked: int, plan: StepPlan, work: DraftTime
    ) -> None:
        """What drafting has taken, for so many rows."""
        number = self._number.get((drafters, False))
        if number is not None and not work.ahead and not self._was_ahead:
            self.draft_costs[number].observe(asked, work)
        number = self._number.get((drafters, True))
        if number is not None and work.ahead:
            # A guess at the token that is being chosen comes before the drafts.
            depths = [row.ahead + 1 for row in plan.rows if row.ahead]
            beside = DraftTime(work.beside, max(depths), sum(depths))
            self.draft_costs[number].observe(work.ahead, beside)

    # --- deciding -------------------------------------------------------------------------------

    def _drafters(self, sequence: Sequence, number: int) -> tuple[int, ...]:
        wanted = self._alone.get(sequence.request.speculation.drafter or "")
        return wanted or self.options[number].drafters

    def _soon(self, running: list[Sequence], joining: int, unread: int) -> int:
        """How many rows there will be in a few steps, when the first prompts are read."""
        room, rows = EVERY * self._step_tokens, 0
        for sequence in running:
            unfed = len(sequence.tokens) - sequence.fed
            rows += unfed <= room
            room = max(room - unfed, 0)
        return rows + (joining if unread <= room else joining * room // unread)

    def _decide(self, live: list[Sequence], soon: int) -> None:
        numbers: Items[int] = (self._option,)
        if not self._usual or self._decisions % ALL_OPTIONS == 0:
            numbers = range(len(self.options))
        self._decisions += 1
        order = self.acceptance.number(self.options[self._option].drafters)
        if self._foreseen.news and order is not None:
            survival = self.acceptance.curves(live, order).survival.mean(0)
            self._foreseen.learn(survival, min(max(math.ceil(self._usual), 1), self.most))
        batch = self._batch(live, soon)
        verifying = self._verifying(live)

        def allocation(number: int, promise: Promise) -> Allocation:
            option, slower = self.options[number], verifying
            if option.ahead:
                slower = verifying.slower(self._steps.beside)
            return allocate(batch, option, promise, self._cost(number), slower)

        found = {number: allocation(number, self._promise(live, number)) for number in numbers}
        chosen = max(found, key=lambda number: found[number].rate)
        if found[chosen].rate < found[self._option].rate * MARGIN:
            chosen = self._option
        best = found[chosen]
        if best.rate < batch.plain * (1.0 if self._usual else MARGIN):
            best = batch.nobody
        self._unlike = not best.drafts.any() and (
            allocation(chosen, self._of_newcomers(live, chosen)).rate >= batch.plain * MARGIN
        )
        if chosen != self._option:
            self._twin_in = self._twin_after = TWIN_AFTER
        self._option = chosen
        # Those near their end say nothing of others.
        far = [s.limit - len(s.tokens) - 2 >= self.most for s in live]
        if any(far):
            self._usual = float(best.drafts[far].mean())
        least = tuple(c.threshold(best.least) for c in self._calibration)
        ahead = self.options[chosen].ahead
        self._rules = Rules(least, self._heard(live, best), ahead, self._patience(best, live))
        for sequence, drafts in zip(live, best.drafts.tolist(), strict=True):
            sequence.drafts = drafts
            sequence.drafters = self._drafters(sequence, chosen)
            if not drafts:
                sequence.exact_pace = sequence.pace = 1.0
        self._news = False

    def _cost(self, number: int) -> DraftCost:
        """Of an option's drafts. Where a model makes them and was not seen to, what it took beside
        other drafters, or by itself."""
        cost = self.draft_costs[number]
        if cost.seen or not self.options[number].computes:
            return cost
        others = zip(self.options, self.draft_costs, strict=True)
        return next((c for option, c in others if option.computes and c.seen), cost)

    def _heard(self, live: list[Sequence], best: Allocation) -> tuple[float, ...]:
        """How much a drafter must promise to be heard before those that would be asked after it:
        what they usually bring, less the tokens that their time would bring."""
        drafters = self.options[self._option].drafters
        heard = [0.0] * len(self._calibration)
        asked = int(np.count_nonzero(best.drafts))
        if not asked:
            return ()
        length = round(float(best.drafts.sum()) / asked)
        price = best.rate * self.draft_costs[self._option].of_a_draft(asked) * length
        for place, number in enumerate(drafters[:-1]):
            behind = drafters[place + 1 :]
            rest = self.acceptance.number(behind)
            if rest is None:
                continue
            usual = float(self.acceptance.curves(live, rest).survival[:, :length].sum(1).mean())
            paid = price if self._computes[behind] else 0.0
            heard[number] = max(usual - paid, 0.0) / self._calibration[number].honesty
        return tuple(heard)

    def _tried(self, rules: Rules) -> Rules:
        """What was decided, or for a few steps with a draft model that works ahead where it does
        not, or does not where it does: what either takes has to be seen now and then."""
        option = self.options[self._option]
        if not self._usual or (option.drafters, not option.ahead) not in self._number:
            return rules
        self._twin_in -= 1
        if self._twin_in >= 0:
            return rules
        if self._twin_in <= -TWIN_STEPS:
            self._twin_after = min(2 * self._twin_after, LONGEST_TWIN)
            self._twin_in = self._twin_after
        return rules._replace(ahead=not option.ahead)

    def _batch(self, live: list[Sequence], soon: int) -> Batch:
        rows, shape = len(live), _shape(live)
        seconds = self._steps.plain(shape) + self._idle.plain
        longest = self._longest(live, seconds)
        self._bound = longest < math.inf
        more = StepShape(soon, soon, shape.decode_context * soon // rows)
        # What was never tried is approached in steps: of later drafts little is known by then.
        cap = min(2 * math.ceil(self._usual) + 4, self.most)
        return Batch(
            plain=rows / seconds,
            soon=soon / (self._steps.plain(more) + self._idle.plain),
            room=np.array([min(s.most_drafts, s.limit - len(s.tokens) - 2, cap) for s in live]),
            drafts=self._step_tokens - rows - round(self._prompts),
            overhead=self._idle.drafted,
            longest=longest,
        )

    def _verifying(self, live: list[Sequence]) -> Verifying:
        """Of rows with up to the most drafts each."""
        rows, shape, ends = len(live), _shape(live), range(VERIFY_POINTS)
        tokens = sorted({round(rows * (1 + self.most) ** (i / ends[-1])) for i in ends})
        seconds = [self._steps.drafted(shape.with_drafts(n - rows, rows)) for n in tokens]
        return Verifying(np.array(tokens, dtype=np.float64), np.array(seconds))

    def _promise(self, live: list[Sequence], number: int) -> Promise:
        """Of an option, or of the drafter that a request asks for."""
        option = self.options[number]
        order = self.acceptance.number(option.drafters)
        assert order is not None
        survival, proposed = self.acceptance.curves(live, order)
        for i, sequence in enumerate(live):
            if sequence.request.speculation.drafter is not None:  # whatever is used for others
                own = self.acceptance.number(self._drafters(sequence, number))
                if own is not None:
                    survival[i] = self.acceptance.curves([sequence], own).survival[0]
        return Promise(
            survival,
            proposed,
            self._foreseen.served(survival.mean(0))[:, None] if option.ahead else 1.0,
            _unread(live, survival) if option.reads else 0.0,
        )

    def _of_newcomers(self, live: list[Sequence], number: int) -> Promise:
        """The same if nothing were known of those who are there."""
        order = self.acceptance.number(self.options[number].drafters)
        assert order is not None
        survival = np.tile(self.acceptance.newcomer(order), (len(live), 1))
        return replace(self._promise(live, number), survival=survival)

    def _patience(self, best: Allocation, live: list[Sequence]) -> int:
        """See `StepPlan.patience`: what the drafts of so many rows bring is more than what all
        would bring in the time that these take."""
        drafters = self.options[self._option].drafters
        waiting = self._number.get((drafters, False))
        order = self.acceptance.number(drafters)
        asked = int(np.count_nonzero(best.drafts))
        if (drafters, True) not in self._number or waiting is None or order is None or not asked:
            return 0
        length = math.ceil(float(best.drafts.sum()) / asked)
        gain = float(self.acceptance.curves(live, order).survival[:, :length].sum(1).mean())
        cost = self.draft_costs[waiting]
        for rows in range(1, asked + 1):
            if rows * gain > best.rate * cost.total(rows, length, rows * length):
                return rows
        return asked + 1

    def _longest(self, live: list[Sequence], plain: float) -> float:
        """Seconds from one step with drafts to the next, by the strictest gap target; one without
        takes `plain`. Drafts leave prompts a share, or these would be read a page at a time."""
        target = gap_target(self._mtpot_target, live)
        if target is None:
            return math.inf
        longest = GAP_AIM * target
        return longest - PROMPTS_SHARE * max(longest - plain, 0.0) if self._shared else longest

    def _probe(self, live: list[Sequence], willing: list[Sequence]) -> None:
        """Has one sequence draft for a step, where the time for it was saved up, so that it is
        noticed when drafts would pay after all. The options take turns, but for those that take too
        long."""
        sequence = min(willing, key=lambda s: len(s.tokens))  # there is least to catch up with
        drafts = min(2, sequence.most_drafts, self.most)
        plain = _shape(live)
        more = self._steps.drafted(plain.with_drafts(drafts, len(live)))
        more -= self._steps.plain(plain)
        for turn in range(self._turn, self._turn + len(self.options)):
            number = turn % len(self.options)
            option, cost = self.options[number], self.draft_costs[number]
            if option.ahead and (option.drafters, False) in self._number:
                continue  # the other says the same
            forwards, tokens = 0, float(len(sequence.tokens))
            if option.computes:
                unread = len(sequence.tokens) - sequence.read_to if option.reads else 0
                forwards, tokens = drafts, float(drafts + unread)
            # The step before has to be read for it, and it for the step after.
            price = cost.total(1, forwards, tokens) + max(more, 0.0) + 2 * self._idle.added
            if self._exploration.probe(price):
                self._turn = turn + 1
                self._probed = sequence
                sequence.drafts = drafts
                sequence.drafters = self._drafters(sequence, number)
                return

    # --- watching -------------------------------------------------------------------------------

    def _watch(self, plan: StepPlan, result: StepResult, now: float, asked: int) -> None:
        """Notes what lies between steps, and whether drafting is slower than plain decoding."""
        before, self._settled_at = self._settled_at, now
        # Who drafts for the next step works during this one, and is waited for before it is told.
        alone = not asked and not self._asked and not self._drafting
        self._asked = asked
        stands_for, self._unwatched = 1 + self._unwatched, 0  # steps
        if before is None:
            return
        prompts, live, shape = 0, plan.shape.rows, plan.shape
        if shape.tokens > shape.rows or result.over:  # seldom, where nobody drafts
            prompts = sum(len(row.chunk) for row in plan.rows if row.chunk)
            live = sum(row.chunk is None for row in plan.rows) - result.over
            shape = shape_as_run(plan, result)
        self._prompts += PROMPTS_RATE * (prompts - self._prompts)
        wall = now - before
        computed = result.seconds + result.drafting.seconds
        if wall < 4 * computed:  # else nobody was there for a while
            self._exploration.earn(stands_for * wall, stands_for)
            if live:
                self._idle.observe(wall - computed, drafts=not alone)
        if not live or plan.copies:
            return
        drafts = shape.tokens > live + prompts
        if drafts or alone:
            self._steps.observe(shape, live, drafts, result.seconds, result.drafting.ahead > 0)
        if not asked:
            return
        # Prompts take the same time in all, whatever they stand beside.
        without = shape.with_drafts(live + prompts - shape.tokens, live)
        plain = self._steps.plain(StepShape(live, live, shape.decode_context))
        chunks = self._steps.plain(without) - plain
        if self._exploration.probing:
            extra = computed - chunks - plain + 2 * self._idle.added
            self._exploration.charge(max(extra, 0.0))
            return
        tokens = sum(
            len(done.tokens)
            for row, done in zip(plan.rows, result.rows, strict=True)
            if row.chunk is None
        )
        seconds = max(computed - chunks, 0.0) + self._idle.drafted
        pause = self._net.saw(tokens, live * seconds / (plain + self._idle.plain))
        if pause:
            self._resting, self._usual = pause, 0.0


def _unread(live: list[Sequence], survival: Floats) -> Floats:
    """[rows]: tokens of each that the draft model has not read, by step of those that it may draft
    for until the sequence is expected to end."""
    unread = np.array([len(s.tokens) - s.read_to for s in live], dtype=np.float64)
    left = [
        s.guess - s.output_len if s.guess > s.output_len else s.limit - len(s.tokens) for s in live
    ]
    return unread / np.maximum(np.array(left) / (1.0 + survival.sum(1)), 1.0)


def _shape(live: list[Sequence]) -> StepShape:
    """Of their step without drafts."""
    return StepShape(len(live), len(live), sum(len(s.tokens) for s in live))
