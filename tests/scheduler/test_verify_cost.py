"""What steps take with drafts and without, each by a factor of its own."""

from __future__ import annotations

import pytest

from scheduler.profile import Profile, StepShape
from scheduler.step_cost import StepCost
from scheduler.verify_cost import LEAST_PLAIN, STALE, Idle, VerifyCost

REFRESH = 4  # plain steps each time, as the controller has it
PLAIN = StepShape(8, 8, 800)
DRAFTED = PLAIN.with_drafts(24, 8)


def linear() -> StepCost:
    """A millisecond a token."""
    shapes = [StepShape(1, n, 0) for n in (1, 8, 32, 64)]
    return StepCost.from_profile(Profile(tuple((shape, 1e-3 * shape.tokens) for shape in shapes)))


def test_a_slow_awakening_is_soon_forgotten() -> None:
    """The first plain steps take twice as long, and then there are always drafts."""
    steps = VerifyCost(linear())
    for _ in range(LEAST_PLAIN):
        steps.observe(PLAIN, 8, False, 16e-3)
    assert steps.plain(PLAIN) == pytest.approx(16e-3)
    for _ in range(300):
        for _ in range(REFRESH if steps.stale else 0):
            steps.observe(PLAIN, 8, False, 8e-3)
        steps.observe(DRAFTED, 8, True, 40e-3)
    assert steps.plain(PLAIN) == pytest.approx(8e-3, rel=0.1)
    assert steps.drafted(DRAFTED) == pytest.approx(40e-3, rel=0.1)


def test_plain_steps_are_asked_for_ever_more_seldom() -> None:
    steps = VerifyCost(linear())
    waits, waited = [], 0
    for _ in range(10 * STALE):
        if steps.stale:
            waits.append(waited)
            waited = 0
            for _ in range(REFRESH):
                steps.observe(PLAIN, 8, False, 8e-3)
        steps.observe(DRAFTED, 8, True, 40e-3)
        waited += 1
    assert waits[:6] == [32, 64, 128, 256, 512, 512]
    assert set(waits[4:]) == {STALE}


def test_prompts_beside_say_little_of_plain_steps() -> None:
    """Steps with a chunk take three times what the profile says."""
    steps, mixed = VerifyCost(linear()), StepShape(9, 8 + 56, 800)
    for _ in range(4):
        steps.observe(PLAIN, 8, False, 8e-3)
        steps.observe(mixed, 8, False, 3 * 64e-3)
    assert steps.plain(PLAIN) < 2 * 8e-3  # evenly weighted it would be 2.8 times


def test_a_new_profile_leaves_what_was_seen() -> None:
    """It is learnt meanwhile: steps seem to take twice as long at first."""
    cost = StepCost.learning()
    cost.observe(PLAIN, 16e-3)
    steps = VerifyCost(cost)
    for _ in range(LEAST_PLAIN):
        steps.observe(PLAIN, 8, False, 8e-3)
    assert steps.plain(PLAIN) == pytest.approx(8e-3)
    fits = cost.fits
    while cost.fits == fits:
        cost.observe(PLAIN, 8e-3)
    assert steps.plain(PLAIN) == pytest.approx(8e-3)


def test_scatter_between_steps_is_no_time() -> None:
    idle = Idle()
    for turn in range(200):
        idle.observe(3e-3 if turn % 2 else -2e-3, drafts=False)
    assert idle.plain == pytest.approx(0.5e-3, abs=0.3e-3)
    for _ in range(200):
        idle.observe(-1e-3, drafts=True)
    assert idle.added == 0.0


def test_few_waits_for_something_else_are_no_time() -> None:
    """Requests that come, for one: a fifth of the plain steps wait for them, and few are seen."""
    idle = Idle()
    for turn in range(10):
        idle.observe(0.1e-3 if turn % 5 else 8e-3, drafts=False)
    assert idle.plain == pytest.approx(0.1e-3)
