"""What drafts were worth, against counts by position."""

from __future__ import annotations

import numpy as np

from scheduler.acceptance import _FIRST_GUESS, _GUESSED, _KEEP_SHARED, Acceptance
from scheduler.choices import choices_of
from scheduler.request import Request, SamplingParams, SchedulerConfig
from scheduler.sequence import Sequence

MOST = 6


def fresh() -> Sequence:
    request = Request("a", (1, 2, 3), SamplingParams(max_tokens=9), 0.0)
    (sequence,) = choices_of(request, SchedulerConfig(num_pages=10), 100, 0)
    return sequence


def test_shares_are_those_of_the_rows_that_got_as_far() -> None:
    rng = np.random.default_rng(3)
    acceptance = Acceptance([(0,)], MOST)
    reached, right, allowed, drafted = np.zeros((4, MOST))
    for _ in range(300):
        most = int(rng.integers(0, MOST + 1))
        proposed = int(rng.integers(0, most + 1))
        accepted = int(rng.integers(0, proposed + 1))
        acceptance.learn(fresh(), (0,), most, proposed, accepted)
        for position in range(most):
            reached[position] += position <= accepted
            right[position] += position < accepted
            allowed[position] += 1
            drafted[position] += position < proposed
        for counts in (reached, right, allowed, drafted):
            counts *= _KEEP_SHARED
    guess = np.array([_FIRST_GUESS[0], *[_FIRST_GUESS[1]] * (MOST - 1)])
    found = acceptance.curves([fresh()], 0)
    shares = (_GUESSED * guess + right) / (_GUESSED + reached)
    np.testing.assert_allclose(found.survival[0], np.cumprod(shares))
    np.testing.assert_allclose(found.proposed, (_GUESSED + drafted) / (_GUESSED + allowed))
