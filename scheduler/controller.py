"""`Controller`: as many drafts for each sequence as pay, and none where none do.

A step that verifies n tokens takes t(n) seconds (`step_cost.py`), drafting takes its own; what they
bring is one token a row and the drafts that turn out right. Draft j of a row counts only if all
before it are right, so what it is expected to bring is the survival a(j) = c(1)·…·c(j). The best
set of drafts for a given number of them is that with the largest survivals, in all rows together,
and as a(j) falls with j it holds a row's first drafts before its later ones. So

    rate(S) = (rows + sum of the S largest a) / (t(rows + S) + drafting)

is looked at for every S, and the best one taken: the rule of TETRIS, of AdaServe's throughput stage
and of DSpark's Algorithm 1. S = 0 is among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scheduler.acceptance import Acceptance
from scheduler.draft_cost import DraftCost
from scheduler.gap import gap_target
from scheduler.plan import Row, RowResult, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.sequence import Sequence
from scheduler.step_cost import StepCost

Floats = NDArray[np.float64]

EVERY = 8  # steps from one decision to the next, unless the batch changes by more than
CHANGE = 8  # one row of so many
MARGIN = 1.02  # by how much another mode must be better than that in use
PROBE_SHARE = 0.01  # of the time may go into drafts that only tell how good drafts would be
PATIENCE = 64  # steps over which drafting must not be slower than plain decoding is predicted to be
PAUSE = 512  # steps without drafts after it was; doubled each time in a row
LONGEST_PAUSE = 16 * PAUSE
GAP_AIM = 0.9  # of a gap target that a step with drafts may take
PACE_RATE = 0.1  # smoothing of tokens a step, per step
PACES = 4  # of a token: paces are rounded, since a forecast takes time for each different one


@dataclass(frozen=True, slots=True)
class Option:
    """One order in which drafters are asked."""

    drafters: tuple[int, ...]
    computes: bool  # a draft model is among them


@dataclass(frozen=True, slots=True)
class Allocation:
    """Numbers of drafts by one option, and what they are predicted to bring."""

    option: int
    plain: float  # tokens per second without drafts
    rate: float  # with these
    least: float
    drafts: NDArray[np.int64]

    def nobody(self) -> Allocation:
        """No drafts instead."""
        return replace(self, rate=self.plain, least=0.0, drafts=np.zeros_like(self.drafts))


class Verify:
    """Seconds to verify by the number of tokens: measured points and what lies between them."""

    def __init__(self, tokens: Floats, seconds: Floats) -> None:
        self._tokens = tokens
        self._seconds = seconds

    def __call__(self, tokens: Floats) -> Floats:
        return np.interp(tokens, self._tokens, self._seconds)


@dataclass(slots=True)
class _Net:
    """Tokens of steps with drafts, and what plain decoding would have brought in their time."""

    steps: int = 0
    tokens: float = 0.0
    plain: float = 0.0


@dataclass(slots=True)
class Decision:
    """What was decided last."""

    rows: int = 0
    age: int = 0  # plans since
    drafts: float = 0.0  # for a sequence that comes before the next, on average
    option: int = 0
    least: float = 0.0
    gain: float = 1.0  # predicted over plain decoding


class Controller:
    """A `DraftPolicy` that follows what drafts were worth and what they took."""

    def __init__(self, options: Items[Option], most: int, cost: StepCost) -> None:
        """`options` must not be empty; `most` is the largest number of drafts in a row."""
        if not options or most < 1:
            raise ValueError("a controller needs somebody who drafts, at least a token")
        self.options = tuple(options)
        self.most = most
        self.draft_cost = DraftCost()
        self.acceptance = Acceptance([option.drafters for option in options], most)
        self._cost = cost
        self._decision = Decision()
        self._net = _Net()
        self._resting = 0  # plans without drafts to come
        self._pause = PAUSE
        self._credit = 0.0  # seconds that may go into probes
        self._probing = False
        self._stopping = False  # nobody is to draft from the next step on
        self._settled_at: float | None = None
        self._overhead = 0.0  # seconds between steps that neither computes

    # --- the policy ----------------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        option = self.options[self._decision.option]
        sequence.drafters = option.drafters
        sequence.drafts = min(math.ceil(self._decision.drafts - 0.5), sequence.most_drafts)

    def plan(self, running: list[Sequence]) -> float:
        decision = self._decision
        decision.age += 1
        if self._stopping:
            self._stopping = False
            for sequence in running:
                sequence.drafts = 0
        if self._resting:
            self._resting -= 1
            return 0.0
        changed = abs(len(running) - decision.rows) * CHANGE > decision.rows
        if decision.age >= EVERY or changed:
            self._decide([s for s in running if s.fed == len(s.tokens)])
        return decision.least

    def learn(self, sequence: Sequence, row: Row, done: RowResult) -> None:
        accepted = max(len(done.tokens) - 1, 0)
        self.acceptance.learn(sequence, row.drafters, row.drafts, done.proposed, accepted)
        pace = sequence.exact_pace + PACE_RATE * (1 + accepted - sequence.exact_pace)
        sequence.exact_pace = pace
        sequence.pace = max(round(pace * PACES) / PACES, 1.0)

    def settled(self, plan: StepPlan, result: StepResult, now: float) -> None:
        drafting = result.drafting
        asked = sum(1 for row in plan.rows if row.drafts)
        if asked:
            self.draft_cost.observe(asked, drafting)
        self._watch(plan, result, now, asked)

    # --- deciding ------------------------------------------------------------------------------

    def _decide(self, live: list[Sequence]) -> None:
        decision = self._decision
        decision.rows, decision.age = len(live), 0
        if not live or not self._cost.ready:
            return
        before = decision.drafts > 0.0
        best = max(
            (self._allocate(live, i) for i in range(len(self.options))), key=lambda a: a.rate
        )
        if best.rate < best.plain * (1.0 if before else MARGIN):
            best = best.nobody()
        decision.option, decision.least = best.option, best.least
        decision.gain = best.rate / best.plain if best.plain else 1.0
        decision.drafts = float(best.drafts.mean())
        drafters = self.options[best.option].drafters
        for sequence, drafts in zip(live, best.drafts.tolist(), strict=True):
            sequence.drafts, sequence.drafters = drafts, drafters
            if not drafts:
                sequence.exact_pace = sequence.pace = 1.0
        self._probing = False
        if not best.drafts.any():
            self._probe(live, best.option)

    def _allocate(self, live: list[Sequence], number: int) -> Allocation:
        """The best numbers of drafts if this option is used for all."""
        option, most = self.options[number], self.most
        rows = len(live)
        curves = [self.acceptance.of(sequence, number) for sequence in live]
        survival = np.array([curve.survival for curve in curves])
        proposed = np.array([curve.proposed for curve in curves])
        allowed = np.array([min(s.most_drafts, s.limit - len(s.tokens) - 2, most) for s in live])
        survival[np.arange(most) >= allowed[:, None]] = 0.0
        order = np.argsort(-survival, axis=None, kind="stable")
        order = order[survival.ravel()[order] > 0.0]
        columns = order % most
        verify = self._verify_seconds(live, rows * (1 + most))
        plain = rows / (float(verify(np.array(rows))) + self._overhead)
        best = Allocation(number, plain, plain, 0.0, np.zeros(rows, dtype=np.int64))
        depths = range(1, most + 1) if option.computes else (most,)
        for depth in depths:
            chosen = order[columns < depth]
            if not len(chosen):
                continue
            gained = rows + np.cumsum(survival.ravel()[chosen])
            tokens = np.cumsum(proposed.ravel()[chosen])
            # Rows that draft: as soon as their first draft is among the chosen.
            asked = np.cumsum(chosen % most == 0)
            drafting = self.draft_cost.seconds(asked, depth if option.computes else 0, tokens)
            seconds = verify(rows + tokens) + drafting + self._overhead
            seconds[seconds > self._longest(live)] = np.inf
            rate = gained / seconds
            at = int(np.argmax(rate))
            if rate[at] > best.rate:
                drafts = np.bincount(chosen[: at + 1] // most, minlength=rows)
                least = 0.0
                if option.computes:
                    one_more = self.draft_cost.of_a_draft(max(int(asked[at]), 1))
                    size = rows + tokens[at]
                    slope = float(verify(size + 1.0) - verify(size))
                    least = min(float(rate[at]) * (one_more + slope), 0.9)
                best = Allocation(number, plain, float(rate[at]), least, drafts)
        return best

    def _verify_seconds(self, live: list[Sequence], most: int) -> Verify:
        context = sum(len(s.tokens) for s in live)
        rows = len(live)
        sizes = np.unique(np.geomspace(rows, most, 12).astype(int))
        times = [self._cost.seconds(StepShape(rows, int(n), context, 0)) for n in sizes]
        return Verify(sizes.astype(float), np.array(times))

    def _longest(self, live: list[Sequence]) -> float:
        """Seconds a step may take by the strictest gap target of a request."""
        target = gap_target(None, live)
        return math.inf if target is None else GAP_AIM * target

    def _probe(self, live: list[Sequence], number: int) -> None:
        """Has one sequence draft, where the time for it was saved up, so that it is noticed when
        drafts would pay after all."""
        willing = [s for s in live if s.most_drafts]
        if not willing:
            return
        # The least to catch up with is the youngest's.
        sequence = min(willing, key=lambda s: len(s.tokens))
        option = self.options[number]
        drafts = min(2, sequence.most_drafts, self.most)
        behind = len(sequence.tokens) if option.computes else 0
        price = self.draft_cost.total(1, drafts if option.computes else 0, drafts + behind)
        if price > self._credit:
            return
        self._credit -= price
        self._probing = True
        sequence.drafts, sequence.drafters = drafts, option.drafters

    # --- watching ------------------------------------------------------------------------------

    def _watch(self, plan: StepPlan, result: StepResult, now: float, asked: int) -> None:
        before, self._settled_at = self._settled_at, now
        if before is None:
            return
        wall = now - before
        computed = result.seconds + result.drafting.seconds
        if wall < 4 * computed:  # else nobody was there for a while
            self._overhead += 0.05 * (max(wall - computed, 0.0) - self._overhead)
            self._credit = min(self._credit + PROBE_SHARE * wall, 1.0)
        if not asked or self._probing or any(row.chunk for row in plan.rows):
            return
        live = [(row, done) for row, done in zip(plan.rows, result.rows, strict=True)]
        context = plan.shape.decode_context
        plain = self._cost.seconds(StepShape(len(live), len(live), context, 0)) + self._overhead
        net = self._net
        net.steps += 1
        net.tokens += sum(len(done.tokens) for _, done in live)
        net.plain += len(live) * (computed + self._overhead) / plain
        if net.steps < PATIENCE:
            return
        if net.tokens < net.plain:
            self._rest()
        else:
            self._pause = PAUSE
        self._net = _Net()

    def _rest(self) -> None:
        """Drafting was slower than plain decoding would have been: none for a while."""
        self._resting = self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._decision = Decision(option=self._decision.option)
        self._stopping = True
