"""The cost of drafting is found again in noisy times, and follows a change."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.draft_cost import DraftCost
from scheduler.plan import DraftTime

ROW, FORWARD, TOKEN = 80e-6, 150e-6, 4e-6


def feed(cost: DraftCost, steps: int, rng: np.random.Generator, slower: float = 1.0) -> None:
    for _ in range(steps):
        rows, depth = int(rng.integers(1, 9)), int(rng.integers(0, 9))
        tokens = rows * depth + (int(rng.integers(0, 300)) if rng.random() < 0.1 else 0)
        seconds = slower * (ROW * rows + FORWARD * depth + TOKEN * tokens)
        # Skew, as times are: most a little below the mean, some far above.
        cost.observe(rows, DraftTime(seconds * rng.gamma(4.0) / 4.0, depth, tokens))


def test_a_sum_is_taken_apart() -> None:
    cost, rng = DraftCost(), np.random.default_rng(0)
    assert cost.total(4, 4, 100) == 0.0
    feed(cost, 1500, rng)
    assert cost.total(8, 0, 0) == pytest.approx(8 * ROW, rel=0.25)
    assert cost.total(4, 8, 32) == pytest.approx(4 * ROW + 8 * FORWARD + 32 * TOKEN, rel=0.1)
    assert cost.of_a_draft(4) == pytest.approx(FORWARD / 4 + TOKEN, rel=0.3)
    many = cost.seconds(np.array([4, 4]), np.array([8, 0]), np.array([32.0, 0.0]))
    assert many.tolist() == pytest.approx([cost.total(4, 8, 32), cost.total(4, 0, 0)])
    feed(cost, 1000, rng, slower=2.0)
    assert cost.total(4, 8, 32) == pytest.approx(2 * (4 * ROW + 8 * FORWARD + 32 * TOKEN), rel=0.1)


def test_a_disturbed_step_hardly_counts() -> None:
    cost, rng = DraftCost(), np.random.default_rng(1)
    feed(cost, 500, rng)
    before = cost.total(4, 4, 16)
    cost.observe(4, DraftTime(5.0, 4, 16))
    feed(cost, 40, rng)
    assert cost.total(4, 4, 16) < 1.2 * before
