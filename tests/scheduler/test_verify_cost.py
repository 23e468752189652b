"""What steps take with drafts and without, each by a factor of its own."""

from __future__ import annotations

import pytest

from scheduler.profile import Profile, StepShape
from scheduler.step_cost import StepCost
from scheduler.verify_cost import LEAST_PLAIN, STALE, VerifyCost

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
        steps.observe(PLAIN, False, 16e-3)
    assert steps.plain(PLAIN) == pytest.approx(16e-3)
    for _ in range(300):
        for _ in range(REFRESH if steps.stale else 0):
            steps.observe(PLAIN, False, 8e-3)
        steps.observe(DRAFTED, True, 40e-3)
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
                steps.observe(PLAIN, False, 8e-3)
        steps.observe(DRAFTED, True, 40e-3)
        waited += 1
    assert waits[:6] == [32, 64, 128, 256, 512, 512]
    assert set(waits[4:]) == {STALE}
