"""Draft lengths of batches: against an oracle, every fixed length, gap targets, and prompts."""

from __future__ import annotations

from dataclasses import replace

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
from scheduler.controller import GAP_AIM, Controller
from scheduler.plan import DraftTime, Row, RowResult, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.request import Request, SamplingParams, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.simulated_drafts import DraftingCosts
from scheduler.speculation import FixedDrafts
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
