"""Draft lengths: against an oracle, against every fixed length, and through sudden changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.scheduling_policies import H200_8B
from benchmarks.speculation_simulated import (
    FREE,
    MODEL,
    MOST,
    Make,
    backlog,
    controller,
    fixed,
    rate,
)
from scheduler.allocation import Option
from scheduler.controller import GAP_AIM, SELDOM, TWIN_AFTER, TWIN_STEPS, WATCH_EVERY, Controller
from scheduler.exploration import PROBE_SHARE
from scheduler.plan import DraftTime, Row, RowResult, Shadow, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.request import Request, SamplingParams, SchedulerConfig, Speculation
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from scheduler.simulated_drafts import DraftingCosts
from scheduler.speculation import NO_RULES, FixedDrafts
from scheduler.step_cost import StepCost
from scheduler.verify_cost import LEAST_PLAIN

COPY_CHAT_RANDOM = (0.95, 0.6, 0.0)
SECONDS = 6.0

CASES = [((0.7,), 4), ((0.2,), 16), ((0.9,), 64), (COPY_CHAT_RANDOM, 32), ((0.5,), 256)]


@pytest.mark.parametrize(("chances", "streams"), CASES)
@pytest.mark.parametrize("drafting", [MODEL, FREE], ids=["model", "free"])
def test_it_nearly_reaches_an_oracle_and_never_loses(
    chances: tuple[float, ...], streams: int, drafting: DraftingCosts
) -> None:
    trace = backlog(20 * streams + 40, chances)
    computes = drafting is MODEL

    def of(make: Make) -> float:
        return rate(make, trace, streams, drafting, SECONDS)

    auto = of(controller(computes))
    assert auto >= 0.97 * of(controller(computes, chances))
    assert auto >= 0.98 * of(fixed(0))
    assert auto >= 0.95 * max(of(fixed(k)) for k in (1, 2, 4, 8))


def test_lengths_of_each_request_beat_any_common_one() -> None:
    trace = backlog(800, COPY_CHAT_RANDOM)
    auto = rate(controller(computes=False), trace, 64, FREE, SECONDS)
    assert auto >= 1.08 * max(rate(fixed(k), trace, 64, FREE, SECONDS) for k in range(MOST + 1))


def test_a_rate_is_not_taken_of_requests_that_run_out() -> None:
    with pytest.raises(RuntimeError, match="2 requests do not last 1 streams"):
        rate(fixed(0), backlog(2, (0.5,)), 1, FREE, SECONDS)


def test_drafts_fit_into_a_step_and_the_best_are_taken() -> None:
    """Where a step has room for few, every row gets its first ones, not the first rows all."""
    cost = StepCost.from_profile(H200_8B)
    policy = Controller([Option((0,), True)], ["model"], MOST, cost, step_tokens=100)
    scheduler = Scheduler(SchedulerConfig(num_pages=4000, max_step_tokens=100), policy, cost=cost)
    for i in range(30):
        scheduler.add(Request(str(i), (1,) * 40, SamplingParams(max_tokens=4000), 0.0), 0.0)
    running = [sequence for (sequence,) in scheduler._requests.values()]
    for sequence in running:
        sequence.fed, sequence.drafts = len(sequence.tokens), 0
    now = 0.0
    for _ in range(200):
        policy.plan(running)
        rows = tuple(Row(i + 1, 1, None, True, s.drafts, (0,)) for i, s in enumerate(running))
        done = [RowResult((1,) * (row.drafts + 1), proposed=row.drafts) for row in rows]
        for sequence, row, result in zip(running, rows, done, strict=True):
            if row.drafts:
                result.drafter = 0
                policy.learn(sequence, row, result)
        work = DraftTime(1e-4, 1, 30) if any(row.drafts for row in rows) else DraftTime()
        now += 5e-3
        shape = StepShape(30, 30 + sum(row.drafts for row in rows), 1200)
        plan = StepPlan(0, (), rows, shape=shape)
        policy.settled(plan, StepResult(0, tuple(done), 4e-3, work), now)
    drafts = [sequence.drafts for sequence in running]
    assert 60 <= sum(drafts) <= 70
    assert max(drafts) - min(drafts) <= 1


@pytest.mark.parametrize(
    ("reads", "prompt", "drafted"), [(True, 40, True), (True, 8000, False), (False, 8000, True)]
)
def test_a_text_has_to_be_worth_reading(reads: bool, prompt: int, drafted: bool) -> None:
    """Twenty tokens are left to write, and each that is read costs a twentieth of a step."""
    cost = StepCost.from_profile(H200_8B)
    policy = Controller([Option((0,), True, reads=reads)], ["model"], MOST, cost)
    scheduler = Scheduler(SchedulerConfig(num_pages=4000), policy, cost=cost)
    for name, size, most in (("a", 40, 4000), ("b", prompt, 20)):
        scheduler.add(Request(name, (1,) * size, SamplingParams(max_tokens=most), 0.0), 0.0)
    first, second = (sequence for (sequence,) in scheduler._requests.values())
    first.fed, second.fed = len(first.tokens), len(second.tokens)
    now = 0.0
    for step in range(100):  # the first one is drafted for
        policy.plan([first])
        row = Row(1, 1, None, True, first.drafts, (0,))
        done = RowResult((1,) * (first.drafts + 1), proposed=first.drafts)
        done.drafter = 0 if first.drafts else -1
        policy.learn(first, row, done)
        read = first.drafts + step % 3
        work = DraftTime(1e-4 * first.drafts + 2e-4 * read, first.drafts, read)
        now += 5e-3
        plan = StepPlan(0, (), (row,), shape=StepShape(1, 1 + first.drafts, 40, 0))
        policy.settled(plan, StepResult(0, (done,), 4e-3, work), now)
    assert first.drafts
    assert first.read_to == len(first.tokens)
    policy._decide([second], 1)
    assert bool(second.drafts) == drafted


def test_prompts_that_are_nearly_read_count_as_rows_to_come() -> None:
    cost = StepCost.from_profile(H200_8B)
    policy = Controller([Option((0,), True)], ["model"], MOST, cost, step_tokens=100)
    scheduler = Scheduler(SchedulerConfig(num_pages=4000, max_step_tokens=100), policy, cost=cost)
    for name, size in enumerate((40, 300, 400, 400, 40)):  # 800 tokens are read in eight steps
        scheduler.add(Request(str(name), (1,) * size, SamplingParams(max_tokens=9), 0.0), 0.0)
    running = [sequence for (sequence,) in scheduler._requests.values()]
    running[0].fed = 40
    assert policy._soon(running, 10, 400) == 3
    running[3].fed = 360
    assert policy._soon(running, 0, 0) == 5
    assert policy._soon(running, 10, 20) == 15
    assert policy._soon(running, 10, 100) == 7, "20 tokens are left for their prompts of 10"


WILLING = Speculation()


class Alone:
    """A controller and one live sequence, whose drafts come true with a given chance."""

    def __init__(self, speculation: Speculation = WILLING, *options: Option, seed: int = 1) -> None:
        cost = StepCost.from_profile(H200_8B)
        every = Option((0,), False), Option((0, 1), True), Option((1,), True)
        self.policy = Controller(options or every, ["suffix", "model"], MOST, cost)
        self.rules = NO_RULES
        self.scheduler = Scheduler(SchedulerConfig(num_pages=2000), self.policy, cost=cost)
        params = SamplingParams(max_tokens=4000)
        self.scheduler.add(Request("0", (1,) * 40, params, 0.0, speculation=speculation), 0.0)
        ((self.sequence,),) = self.scheduler._requests.values()
        self.sequence.fed = len(self.sequence.tokens)
        self._rng = np.random.default_rng(seed)
        self._behind = 40  # tokens that the draft model has not read
        self.now = 0.0
        self.lengths: list[int] = []
        self.shadows: tuple[Shadow, ...] = ()
        self.idle = 0.0  # seconds between a step with drafts and its neighbours
        self.beside: list[Sequence] = []  # that are still being read

    def step(self, chance: float) -> None:
        self.rules = rules = self.policy.plan([self.sequence, *self.beside])
        drafts, drafters = self.sequence.drafts, self.sequence.drafters
        self.lengths.append(drafts)
        ahead = drafts if rules.ahead else 0
        row = Row(1, 1, None, True, drafts, drafters, ahead)
        right = 0
        while right < drafts and self._rng.random() < chance:
            right += 1
        done = RowResult((1,) * (right + 1), proposed=drafts)
        if drafts:
            done.drafter = drafters[-1]
            done.confidence = (0.6,) * drafts
            self.policy.learn(self.sequence, row, done)
        shape = StepShape(1, 1 + drafts, 40)
        plan = StepPlan(0, (), (row,), shape, rules.least, rules.heard)
        self._behind += right + 1
        work = DraftTime()
        if drafts and 1 in drafters:
            tokens = drafts + self._behind
            work = DraftTime(0.5e-3 * drafts + 2e-6 * tokens, drafts, tokens)
            self._behind = 0
        seconds = 4.5e-3
        if ahead:  # it pays under no circumstances
            seconds *= 3
            work = work._replace(beside=1e-3 * ahead, ahead=1)
        self.now += seconds + work.seconds + self.idle * any(self.lengths[-2:])
        result = StepResult(0, (done,), seconds, work, self.shadows)
        self.shadows = ()
        self.policy.settled(plan, result, self.now)

    def mean(self, steps: int) -> float:
        return sum(self.lengths[-steps:]) / steps


def test_it_follows_a_sudden_change_within_50_steps_and_does_not_flap() -> None:
    """Up as well as down, by the median: with drafts off a change is seen by a probe only, and
    after drafts have lost there are none for a while."""
    up = []
    for seed in range(9):
        alone = Alone(WILLING, Option((1,), True), seed=seed)
        for _ in range(200):
            alone.step(0.9)
        assert alone.mean(50) > 5
        for _ in range(50):
            alone.step(0.1)
        assert alone.mean(5) <= 2
        for _ in range(100):
            alone.step(0.1)
        assert alone.mean(100) <= 1
        for steps in range(300):
            alone.step(0.95)
            if alone.mean(10) > 5 and steps >= 10:
                break
        up.append(steps)
        for _ in range(150):
            alone.step(0.95)
        assert alone.mean(100) > 5
        last = alone.lengths[-100:]
        assert sum(a != b for a, b in pairwise(last)) <= 10
    assert sorted(up)[4] <= 50
    assert max(up) < 299


def test_steps_with_prompts_beside_tell_what_drafts_take() -> None:
    """Under load hardly a step is without a chunk. Here verifying takes four times what the profile
    says, so drafts that are right half the time lose."""
    cost = StepCost.from_profile(H200_8B)
    policy = Controller([Option((0,), False)], ["suffix"], MOST, cost)
    scheduler = Scheduler(SchedulerConfig(num_pages=4000), policy, cost=cost)
    for i in range(16):
        scheduler.add(Request(str(i), (1,) * 40, SamplingParams(max_tokens=4000), 0.0), 0.0)
    running = [sequence for (sequence,) in scheduler._requests.values()]
    for sequence in running:
        sequence.fed, sequence.drafts = len(sequence.tokens), 0
    rng, now, made = np.random.default_rng(4), 0.0, []
    prompt = Row(99, 99, (1,) * 64, False)
    for _ in range(400):
        policy.plan(running)
        rows = [Row(i + 1, 1, None, True, s.drafts, (0,)) for i, s in enumerate(running)]
        done = []
        for sequence, row in zip(running, rows, strict=True):
            right = min(int(rng.geometric(0.5)) - 1, row.drafts)
            done.append(RowResult((1,) * (right + 1), proposed=row.drafts, drafter=0))
            if row.drafts:
                policy.learn(sequence, row, done[-1])
        drafts = sum(row.drafts for row in rows)
        made.append(drafts)
        plain = StepShape(16, 16, 640).with_chunk(64, 0)
        shape = replace(plain, tokens=plain.tokens + drafts)
        seconds = cost.uncorrected(shape) * (4.0 if drafts else 1.0)
        now += seconds
        plan = StepPlan(0, (), (*rows, prompt), shape=shape)
        policy.settled(plan, StepResult(0, (*done, RowResult()), seconds), now)
    assert max(made) > 16  # by the profile they pay
    assert sum(made[-200:]) / 200 < 3


@pytest.mark.parametrize("chance", [0.95, 0.99])
def test_what_plain_steps_take_is_seen_before_and_between_drafts(chance: float) -> None:
    """Each token costs its full time, drafts cost more: nothing is won however many are right. A
    cost that is learnt while serving knows no better if it only ever sees steps with drafts."""
    cost = StepCost.learning()
    policy = Controller([Option((0,), True)], ["model"], MOST, cost)
    scheduler = Scheduler(SchedulerConfig(num_pages=20000), policy, cost=cost)
    scheduler.add(Request("0", (1,) * 40, SamplingParams(max_tokens=9000), 0.0), 0.0)
    ((sequence,),) = scheduler._requests.values()
    sequence.fed = len(sequence.tokens)
    rng, now, lengths = np.random.default_rng(2), 0.0, []
    for _ in range(1500):
        policy.plan([sequence])
        drafts = sequence.drafts
        lengths.append(drafts)
        right = 0
        while right < drafts and rng.random() < chance:
            right += 1
        row = Row(1, 1, None, True, drafts, sequence.drafters)
        done = RowResult((1,) * (right + 1), proposed=drafts)
        if drafts:
            done.drafter = 0
            done.confidence = (0.9,) * drafts
            policy.learn(sequence, row, done)
        shape = StepShape(1, 1 + drafts, 40, 0)
        seconds, work = 0.5e-3 * (1 + drafts), DraftTime()
        if drafts:
            work = DraftTime(0.3e-3 * drafts, drafts, drafts)
        cost.observe(shape, seconds)
        now += seconds + work.seconds + 0.05e-3
        plan = StepPlan(0, (), (row,), shape=shape)
        policy.settled(plan, StepResult(0, (done,), seconds, work), now)
    assert set(lengths[:6]) == {0}
    assert sum(lengths[-500:]) <= 25


def test_what_lies_between_steps_with_drafts_counts() -> None:
    """They are not in flight two at a time, as plain ones are. Four tokens in twice the time are a
    gain, two in three times are not."""
    for chance, idle, drafted in ((0.5, 0.0, True), (0.8, 5e-3, True), (0.5, 10e-3, False)):
        alone = Alone(WILLING, Option((0,), False))
        alone.idle = idle
        for _ in range(1500):
            alone.step(chance)
        assert (alone.mean(500) > 3) == drafted, idle
        if not drafted:
            assert alone.mean(500) < 0.2


def test_probes_take_no_more_than_their_share_of_the_time() -> None:
    """With what they keep waiting. Nothing is ever right."""
    alone = Alone(WILLING, Option((0,), False))
    alone.idle = 10e-3
    for _ in range(500):
        alone.step(0.0)
    before = alone.now
    for _ in range(5000):
        alone.step(0.0)
    probes = sum(drafts > 0 for drafts in alone.lengths[-5000:])
    assert probes > 2
    assert 2 * probes * alone.idle < 1.2 * PROBE_SHARE * (alone.now - before)


def test_plain_steps_are_not_forgotten_while_drafts_pay() -> None:
    alone = Alone(WILLING, Option((1,), True))
    for _ in range(1300):
        alone.step(0.95)
    without = [i for i, drafts in enumerate(alone.lengths[100:]) if not drafts]
    assert 2 <= len(without) <= 2 * 12


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

    def drafts(target: float | None, of_all: float | None = None) -> tuple[int, float]:
        """Drafts of all, and the seconds of their step."""
        policy = Controller([Option((0,), False)], ["suffix"], MOST, cost, of_all)
        config = SchedulerConfig(num_pages=4000, max_num_seqs=256)
        scheduler = Scheduler(config, policy, cost=cost)
        for i in range(100):
            wanted = target if i == 7 else None
            scheduler.add(Request(str(i), (1,) * 40, params, 0.0, mtpot_target=wanted), 0.0)
        live = [s for group in scheduler._requests.values() for s in group]
        for sequence in live:
            sequence.fed = len(sequence.tokens)
        shape = StepShape(100, 100, 4000, 0)
        for _ in range(LEAST_PLAIN):
            policy._steps.observe(shape, 100, False, cost.uncorrected(shape))
        policy.plan(live)
        made = sum(s.drafts for s in live)
        return made, float(policy._verifying(live).of(100 + made))

    free, seconds = drafts(None)
    assert free > 50
    plain = StepCost.from_profile(H200_8B).seconds(StepShape(100, 100, 4000, 0))
    middle = (plain + seconds) / 2
    bounded, less = drafts(middle / GAP_AIM)
    assert 2 < bounded < free
    assert less <= middle
    assert drafts(None, middle / GAP_AIM) == (bounded, less)


def test_prompts_get_a_share_of_what_a_gap_target_leaves() -> None:
    """Drafts would take all of it. As soon as a prompt waits, not at the next decision."""
    cost = StepCost.from_profile(H200_8B)
    plain = StepShape(100, 100, 4000)
    seconds = cost.seconds(plain)
    target = (seconds + 1e-4) / GAP_AIM
    policy = Controller([Option((0,), False)], ["suffix"], MOST, cost, mtpot_target=target)
    scheduler = Scheduler(SchedulerConfig(num_pages=4000, max_num_seqs=256), policy, cost=cost)
    for i in range(100):
        scheduler.add(Request(str(i), (1,) * 40, SamplingParams(max_tokens=500), 0.0), 0.0)
    live = [s for group in scheduler._requests.values() for s in group]
    for sequence in live:
        sequence.fed = len(sequence.tokens)
    for _ in range(LEAST_PLAIN):
        policy._steps.observe(plain, 100, False, seconds)

    def taken(joining: int) -> float:
        """Seconds that the drafts of all take."""
        policy.plan(live, joining, 400 * joining)
        drafts = sum(s.drafts for s in live)
        return cost.seconds(plain.with_drafts(drafts, 100)) - seconds

    all_of_it = taken(0)
    assert 0.7e-4 < all_of_it <= 1e-4
    assert 0.0 < taken(1) <= 0.5e-4
    assert taken(0) == pytest.approx(all_of_it)


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


def test_who_gets_a_slot_has_as_many_drafts_as_others() -> None:
    """Not those of the time when it came, when nobody had any."""
    policy = FixedDrafts(0)
    scheduler = Scheduler(SchedulerConfig(num_pages=20), policy)
    scheduler.add(Request("0", (1,) * 40, SamplingParams(max_tokens=40), 0.0), 0.0)
    ((sequence,),) = scheduler._requests.values()
    policy._drafts = 3
    assert sequence.drafts == 0
    scheduler.plan(1.0)
    assert sequence.drafts == 3


def test_who_is_still_read_loses_drafts_that_end_for_others() -> None:
    alone = Alone(WILLING, Option((1,), True))
    for _ in range(200):
        alone.step(0.95)
    params = SamplingParams(max_tokens=400)
    alone.scheduler.add(Request("1", (1,) * 900, params, 0.0), 0.0)
    (reading,) = alone.scheduler._requests["1"]
    alone.policy.begin(reading)
    assert reading.drafts > 5
    alone.beside = [reading]
    for _ in range(60):
        alone.step(0.0)
    assert alone.sequence.drafts == reading.drafts == 0


def test_a_batch_in_which_nobody_wants_drafts_decides_nothing() -> None:
    alone = Alone(Speculation(enabled=False))
    for _ in range(200):
        alone.step(0.9)
    assert set(alone.lengths) == {0}
    assert alone.policy._decisions == 0


def test_a_step_during_which_the_next_is_drafted_for_is_no_plain_one() -> None:
    """It takes longer, and is told late. That plain steps take so long would be believed for
    hundreds of steps where there are always drafts."""
    alone = Alone(Speculation(enabled=False), Option((1,), True))
    for _ in range(40):
        alone.step(0.0)
    policy, shape = alone.policy, StepShape(1, 1, 40)

    def settle_late(drafts: int) -> tuple[float, float]:
        policy._unwatched, policy._plans = WATCH_EVERY - 1, SELDOM
        alone.sequence.drafts = drafts
        policy.plan([alone.sequence])  # the next step
        alone.now += 40e-3
        row = Row(1, 1, None, True, 0, ())
        done = StepResult(0, (RowResult((1,)),), 20e-3, DraftTime(), ())
        policy.settled(StepPlan(0, (), (row,), shape, (), ()), done, alone.now)
        return policy._steps.plain(shape), policy._idle.plain

    before = policy._steps.plain(shape), policy._idle.plain
    assert settle_late(4) == before
    assert settle_late(0) > before  # negative control


def test_working_ahead_is_kept_where_it_pays() -> None:
    """A draft model on a device of its own, against the same one taking turns; and one that slows
    the target down so much that it does not pay, which must be found out at little cost."""
    slow = DraftingCosts(forward=1.2e-3, token=0.01e-3)
    beside = DraftingCosts(slow.forward, slow.token, ahead=True, foreseen=0.7)
    trace = backlog(60, (0.8,))
    for streams in (1, 4):
        turns = rate(controller(True), trace, streams, slow, SECONDS)
        both = rate(controller(True, ahead=True), trace, streams, beside, SECONDS)
        assert both > 1.2 * turns
    useless = DraftingCosts(slow.forward, slow.token, ahead=True, foreseen=0.0)
    hopeless = backlog(60, (0.2,))
    turns = rate(controller(True), hopeless, 4, slow, SECONDS)
    assert rate(controller(True, ahead=True), hopeless, 4, useless, SECONDS) > 0.97 * turns


def test_whether_it_works_ahead_is_tried_again() -> None:
    """What either takes is forgotten unless it is seen, so the other way has its turns, ever more
    seldom while nothing changes."""
    alone = Alone(WILLING, Option((1,), True), Option((1,), True, ahead=True))
    for _ in range(128):  # until both were seen
        alone.step(0.9)
    tried = 0
    for _ in range(5 * TWIN_AFTER):
        alone.step(0.9)
        tried += alone.rules.ahead
    assert tried == 2 * TWIN_STEPS
