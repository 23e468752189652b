"""Draft lengths: against an oracle, against every fixed length, and through sudden changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from benchmarks.scheduling_policies import H200_8B
from scheduler.acceptance import Acceptance, Curves
from scheduler.controller import GAP_AIM, Controller, Option
from scheduler.outcome import Targets
from scheduler.plan import DraftTime, Row, RowResult, Shadow, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.request import Request, SamplingParams, SchedulerConfig, Speculation
from scheduler.scheduler import Scheduler
from scheduler.simulate import simulate
from scheduler.simulated_drafts import DraftingCosts
from scheduler.speculation import DraftPolicy, FixedDrafts
from scheduler.step_cost import StepCost
from scheduler.trace import TraceRequest

MOST = 8
MODEL = DraftingCosts(forward=0.6e-3, token=0.01e-3)
FREE = DraftingCosts(forward=0.0)
COPY_CHAT_RANDOM = (0.95, 0.6, 0.0)
SECONDS = 6.0

Make = Callable[[StepCost], DraftPolicy]


class Knowing(Acceptance):
    """Is told how probable each request's next draft is to be right, by its number."""

    def __init__(self, chances: Sequence[float]) -> None:
        super().__init__([(0,)], MOST)
        self._chances = chances

    def curves(self, sequences, number):  # type: ignore[no-untyped-def]
        chance = np.array(
            [self._chances[int(s.request.id) % len(self._chances)] for s in sequences]
        )
        return Curves(chance[:, None] ** np.arange(1, MOST + 1), np.ones(MOST))


def controller(computes: bool = True, knows: Sequence[float] | None = None) -> Make:
    def make(cost: StepCost) -> Controller:
        made = Controller([Option((0,), computes)], ["model"], MOST, cost)
        if knows is not None:
            made.acceptance = Knowing(knows)
        return made

    return make


def backlog(count: int, chances: Sequence[float], tokens: int = 400) -> list[TraceRequest]:
    """Requests that all wait from the start, in turn with each of these chances."""
    rng = np.random.default_rng(0)
    trace = []
    for i in range(count):
        hits = rng.random(tokens) < chances[i % len(chances)]
        right = "".join("1" if hit else "0" for hit in hits)
        trace.append(TraceRequest(0.0, 200, tokens, tokens, right=right))
    return trace


def rate(make: Make, trace: list[TraceRequest], streams: int, drafting: DraftingCosts) -> float:
    """Tokens in a fixed time, during which there is always somebody waiting."""
    cost = StepCost.from_profile(H200_8B)
    config = SchedulerConfig(num_pages=60_000, max_num_seqs=streams, max_queued_requests=10**5)
    scheduler = Scheduler(config, make(cost), cost=cost)
    machine = StepCost.from_profile(H200_8B)
    simulate(trace, scheduler, machine, Targets(), drafting=drafting, horizon=SECONDS)
    assert scheduler.load().waiting
    return scheduler.load().generated_tokens


def fixed(drafts: int) -> Make:
    return lambda cost: FixedDrafts(drafts)


CASES = [((0.7,), 4), ((0.2,), 16), ((0.9,), 64), (COPY_CHAT_RANDOM, 32), ((0.5,), 256)]


@pytest.mark.parametrize(("chances", "streams"), CASES)
@pytest.mark.parametrize("drafting", [MODEL, FREE], ids=["model", "free"])
def test_it_nearly_reaches_an_oracle_and_never_loses(
    chances: tuple[float, ...], streams: int, drafting: DraftingCosts
) -> None:
    trace = backlog(20 * streams + 40, chances)
    computes = drafting is MODEL
    auto = rate(controller(computes), trace, streams, drafting)
    assert auto >= 0.97 * rate(controller(computes, knows=chances), trace, streams, drafting)
    assert auto >= 0.98 * rate(fixed(0), trace, streams, drafting)
    assert auto >= 0.95 * max(rate(fixed(k), trace, streams, drafting) for k in (1, 2, 4, 8))


def test_lengths_of_each_request_beat_any_common_one() -> None:
    trace = backlog(800, COPY_CHAT_RANDOM)
    auto = rate(controller(computes=False), trace, 64, FREE)
    assert auto >= 1.08 * max(rate(fixed(k), trace, 64, FREE) for k in range(MOST + 1))


WILLING = Speculation()


class Alone:
    """A controller and one live sequence, whose drafts come true with a given chance."""

    def __init__(self, speculation: Speculation = WILLING, *options: Option) -> None:
        cost = StepCost.from_profile(H200_8B)
        every = Option((0,), False), Option((0, 1), True), Option((1,), True)
        self.policy = Controller(options or every, ["suffix", "model"], MOST, cost)
        self.scheduler = Scheduler(SchedulerConfig(num_pages=2000), self.policy, cost=cost)
        params = SamplingParams(max_tokens=4000)
        self.scheduler.add(Request("0", (1,) * 40, params, 0.0, speculation=speculation), 0.0)
        ((self.sequence,),) = self.scheduler._requests.values()
        self.sequence.fed = len(self.sequence.tokens)
        self._rng = np.random.default_rng(1)
        self._behind = 40  # tokens that the draft model has not read
        self.now = 0.0
        self.lengths: list[int] = []
        self.shadows: tuple[Shadow, ...] = ()

    def step(self, chance: float) -> None:
        rules = self.policy.plan([self.sequence])
        drafts, drafters = self.sequence.drafts, self.sequence.drafters
        self.lengths.append(drafts)
        row = Row(1, 1, None, True, drafts, drafters)
        right = 0
        while right < drafts and self._rng.random() < chance:
            right += 1
        done = RowResult((1,) * (right + 1), proposed=drafts)
        if drafts:
            done.drafter = drafters[-1]
            done.confidence = (0.6,) * drafts
            self.policy.learn(self.sequence, row, done)
        plan = StepPlan(0, (), (row,), least=rules.least, heard=rules.heard)
        self.now += 5e-3
        self._behind += right + 1
        work = DraftTime()
        if drafts and 1 in drafters:
            tokens = drafts + self._behind
            work = DraftTime(0.5e-3 * drafts + 2e-6 * tokens, drafts, tokens)
            self._behind = 0
        result = StepResult(0, (done,), 4.5e-3, work, self.shadows)
        self.shadows = ()
        self.policy.settled(plan, result, self.now)

    def mean(self, steps: int) -> float:
        return sum(self.lengths[-steps:]) / steps


def test_it_follows_a_sudden_change_within_64_steps_and_does_not_flap() -> None:
    alone = Alone(WILLING, Option((1,), True))
    for _ in range(200):
        alone.step(0.9)
    assert alone.mean(50) > 5
    for _ in range(64):
        alone.step(0.1)
    assert alone.mean(5) <= 2
    for _ in range(100):
        alone.step(0.1)
    assert alone.mean(100) <= 1
    # With drafts off the change is seen by a probe only, and those have little time.
    for _ in range(250):
        alone.step(0.95)
    assert alone.mean(10) > 5
    for _ in range(100):
        alone.step(0.95)
    changes = sum(a != b for a, b in zip(alone.lengths[-100:], alone.lengths[-99:], strict=False))
    assert changes <= 10


def test_a_request_may_forbid_bound_or_choose() -> None:
    off, bounded, chosen = (
        Alone(Speculation(enabled=False)),
        Alone(Speculation(max_draft_tokens=2)),
        Alone(Speculation(drafter="model")),
    )
    for _ in range(60):
        for alone in (off, bounded, chosen):
            alone.step(0.95)
    assert set(off.lengths) == {0}
    assert max(bounded.lengths) == 2
    assert max(chosen.lengths) > 4
    assert chosen.sequence.drafters == (1,)


def test_a_gap_target_bounds_the_step() -> None:
    cost = StepCost.from_profile(H200_8B)
    params = SamplingParams(max_tokens=500)

    def drafts(target: float | None) -> tuple[int, float]:
        """Drafts of all, and the seconds of their step."""
        policy = Controller([Option((0,), False)], ["suffix"], MOST, cost)
        config = SchedulerConfig(num_pages=4000, max_num_seqs=256)
        scheduler = Scheduler(config, policy, cost=cost)
        for i in range(100):
            wanted = target if i == 7 else None
            scheduler.add(Request(str(i), (1,) * 40, params, 0.0, mtpot_target=wanted), 0.0)
        live = [s for group in scheduler._requests.values() for s in group]
        for sequence in live:
            sequence.fed = len(sequence.tokens)
        policy.plan(live)
        made = sum(s.drafts for s in live)
        return made, float(np.interp(100 + made, *policy._verify(live)))

    free, seconds = drafts(None)
    assert free > 50
    plain = StepCost.from_profile(H200_8B).seconds(StepShape(100, 100, 4000, 0))
    middle = (plain + seconds) / 2
    bounded, less = drafts(middle / GAP_AIM)
    assert 2 < bounded < free
    assert less <= middle


def test_texts_written_without_drafts_say_when_drafts_would_pay() -> None:
    alone = Alone(WILLING, Option((1,), True))
    for _ in range(150):
        alone.step(0.0)
    assert alone.mean(50) <= 0.5
    for _ in range(6):
        alone.shadows = (Shadow(1, (True,) * 60 + (False,)),)
        for _ in range(12):
            alone.step(1.0)
    assert alone.mean(4) > 1
