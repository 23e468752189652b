"""How often drafts made ahead are of use: what is expected against what happens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from scheduler.foreseen import Foreseen

MOST = 6


def one_row(chance: float, thought_of: float, drafts: int, steps: int, seed: int):
    """What happens to a row, step by step: whether it has drafts, and whether its outcome was
    foreseen. Without drafts it verifies nothing, and a guess at one token is drafted on for."""
    rng = random.Random(seed)
    has = True
    for _ in range(steps):
        count, right = drafts if has else 0, 0
        while right <= count and rng.random() < chance:
            right += 1
        # All of them and the guess after them; or a wrong one, for which the right one is there.
        foreseen = right > count or (right < count and rng.random() < thought_of)
        yield has, foreseen
        has = foreseen


@pytest.mark.parametrize("drafts", [1, 2, 4, 6])
@pytest.mark.parametrize(
    ("chance", "thought_of"), [(0.8, 0.6), (0.5, 0.0), (0.95, 0.9), (0.3, 0.5)]
)
def test_the_share_that_has_drafts(chance: float, thought_of: float, drafts: int) -> None:
    foreseen = Foreseen()
    foreseen._thought_of = thought_of
    expected = foreseen.served(chance ** np.arange(1, MOST + 1))[drafts - 1]
    happened = [has for has, _ in one_row(chance, thought_of, drafts, 40_000, drafts)]
    assert np.mean(happened) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("thought_of", [0.0, 0.3, 0.8])
def test_what_is_thought_of_is_learnt(thought_of: float) -> None:
    foreseen = Foreseen()
    survival = 0.7 ** np.arange(1, MOST + 1)
    assert not foreseen.news
    estimates = []
    before: int | None = None
    for step, (has, came) in enumerate(one_row(0.7, thought_of, 3, 30_000, 1)):
        foreseen.settled(1, int(has), before)
        before = int(came)
        if step % 8 == 7:
            foreseen.learn(survival, 3)
            estimates.append(foreseen._thought_of)
    assert np.mean(estimates[1000:]) == pytest.approx(thought_of, abs=0.08)
