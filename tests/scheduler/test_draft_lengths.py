"""Draft lengths of one sequence: through sudden changes, probes, and what a request asks for."""

from __future__ import annotations

from itertools import pairwise

from scheduler.allocation import Option
from scheduler.controller import SELDOM, TWIN_AFTER, TWIN_STEPS, WATCH_EVERY
from scheduler.exploration import PROBE_SHARE
from scheduler.plan import DraftTime, Row, RowResult, Shadow, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.request import Request, SamplingParams, Speculation
from tests.scheduler.alone import WILLING, Alone


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
