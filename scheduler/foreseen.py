"""`Foreseen`: how often drafts that were made ahead are of use.

While a row's drafts are verified, the draft model writes on for what is likely to come of it
(`worker/drafters/outcomes.py`): all drafts are right, and so is its guess at the token after them;
or one is wrong, and the right token in its place was thought of. The share of the latter is learnt
here. A row whose outcome was not foreseen may go without drafts for a step. Then one token is
chosen, and there is a guess at it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_FIRST_GUESS = 0.5  # of wrong drafts, those for which the right token was thought of
_RATE = 0.2  # smoothing, each time it learns


class Foreseen:
    """Of all rows. `survival`, [most], is the usual probability that all drafts up to a position
    are right."""

    def __init__(self) -> None:
        self._thought_of = _FIRST_GUESS
        self._with = self._without = 0  # rows of the last step: with drafts, without any
        # The same of steps after which it is known how many were foreseen, and these.
        self._seen_with = self._seen_without = self._foreseen = 0

    def settled(self, asked: int, served: int, foreseen: int | None) -> None:
        """Of a step's `asked` rows so many had drafts; `foreseen` of these, since the outcome of
        the step before was, None if nothing was drafted ahead then."""
        if foreseen is not None:
            self._seen_with += self._with
            self._seen_without += self._without
            self._foreseen += foreseen
        self._with, self._without = served, asked - served

    @property
    def news(self) -> bool:
        """Whether there is anything to learn."""
        return self._seen_with + self._seen_without > 0

    def learn(self, survival: Floats, length: int) -> None:
        """From the `news` since it was last called; rows with drafts had so many."""
        hit, alone = self._hits(survival)
        expected = self._seen_with * float(hit[length - 1]) + self._seen_without * alone
        surprise = (self._foreseen - expected) / (self._seen_with + self._seen_without)
        self._thought_of = min(max(self._thought_of + _RATE * surprise, 0.0), 1.0)
        self._seen_with = self._seen_without = self._foreseen = 0

    def served(self, survival: Floats) -> Floats:
        """The share of rows that have drafts if these are made ahead only, by their number."""
        hit, alone = self._hits(survival)
        return np.asarray(alone / (1.0 - hit + alone))

    def _hits(self, survival: Floats) -> tuple[Floats, float]:
        """How probable it is that a row's outcome is foreseen, by the number of its drafts, and if
        it has none."""
        last = survival[-1] ** 2 / survival[-2] if len(survival) > 1 else survival[-1] ** 2
        hit = np.append(survival[1:], last) + (1.0 - survival) * self._thought_of
        return hit, float(survival[0])  # there is no other than the guess at the coming token
