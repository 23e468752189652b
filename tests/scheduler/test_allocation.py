"""The best numbers of drafts, against all numbers that there are."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from scheduler.allocation import Allocation, Batch, Option, Promise, Verifying, allocate
from scheduler.draft_cost import DraftCost
from scheduler.plan import DraftTime

FREE = Option((0,), computes=False)


class Case:
    """A few rows, drafts of falling worth, and a step that takes longer by more with each token."""

    def __init__(self, seed: int, soon: float) -> None:
        """soon: the plain rate of the rows to come, over that of now."""
        rng = np.random.default_rng(seed)
        self.rows, most = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        self.survival = rng.random((self.rows, most)).cumprod(axis=1)
        self.room = rng.integers(0, most + 1, self.rows)
        tokens = np.arange(1.0, self.rows * (1 + most) + 2)
        self.verifying = Verifying(tokens, 1.0 + (rng.random() * 0.4 * tokens) ** 1.5)
        self.overhead = float(rng.random()) * 0.2
        plain = self.rows / self.seconds(0)
        self.batch = Batch(plain, soon * plain, self.room, 100, self.overhead, math.inf)

    def seconds(self, drafts: int) -> float:
        return float(self.verifying.of(self.rows + drafts)) + self.overhead

    def tokens(self, drafts: tuple[int, ...]) -> float:
        gained = sum(self.survival[row, :count].sum() for row, count in enumerate(drafts))
        return self.rows + float(gained)

    def found(self) -> Allocation:
        promise = Promise(self.survival, np.ones(self.survival.shape[1]))
        return allocate(self.batch, FREE, promise, DraftCost(), self.verifying)


@pytest.mark.parametrize("soon", [0.7, 1.0, 1.2, 1.6])
def test_no_other_numbers_bring_more_than_their_time_is_worth(soon: float) -> None:
    drafted = 0
    for seed in range(150):
        case = Case(seed, soon)
        ways = list(product(*(range(room + 1) for room in case.room)))
        rates = {way: case.tokens(way) / case.seconds(sum(way)) for way in ways}
        worth = max(*rates.values(), case.batch.soon) if len(ways) > 1 else case.batch.soon

        def net(way: tuple[int, ...], case: Case = case, worth: float = worth) -> float:
            return case.tokens(way) - worth * case.seconds(sum(way))

        chosen = tuple(case.found().drafts.tolist())
        assert net(chosen) == pytest.approx(max(map(net, ways)), abs=1e-9)
        assert rates[chosen] >= case.batch.plain * (1 - 1e-12)
        drafted += sum(chosen) > 0
    assert 10 < drafted < 150


def test_rows_to_come_make_drafts_dearer() -> None:
    """A row alone gains by a draft; where sixty more are about to share its steps, it would not."""
    verifying = Verifying(np.array([1.0, 200.0]), np.array([2.0, 2.0 + 199 * 0.05]))
    promise = Promise(np.array([[0.9]]), np.ones(1))
    cost = DraftCost()
    cost.observe(1, DraftTime(0.1, 1, 1))
    cost.observe(1, DraftTime(0.1, 1, 1))

    def drafts(rows: int) -> int:
        soon = rows / float(verifying.of(rows))
        batch = Batch(1 / 2.0, soon, np.array([4]), 100, 0.0, math.inf)
        return int(allocate(batch, Option((0,), True), promise, cost, verifying).drafts.sum())

    assert drafts(1) == 1
    assert drafts(61) == 0


def test_a_text_that_is_read_once_does_not_make_every_draft_dear() -> None:
    """Probes of a drafter without a model read a text from its beginning; later steps do not."""
    cost = DraftCost()
    for tokens in (2, 3, 5, 2, 4, 9, 3, 150, 120, 2, 130, 1, 90, 6, 140, 100):
        cost.observe(1, DraftTime(1e-4 + 1e-5 * tokens, 0, tokens))
    assert float(cost.seconds(np.array([1]), 0, 3.0)[0]) == pytest.approx(1.3e-4, rel=0.1)
