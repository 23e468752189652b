"""`Acceptance`: how many drafts turn out right, from what became of earlier ones.

A draft counts only if all before it are right. So for each option (an order of drafters) and each
position two shares are kept, of the rows that got as far as that position: how many had a draft
there at all, since drafters may have nothing to say or stop early, and how many had a right one.

All sequences together give these shares by position, in the short run. One sequence gives few, so
it has two numbers of its own, for the first position and for all others, that pull the shared ones
towards itself the more it has shown (`_PRIOR` rows weigh as much as what is shared).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.sequence import Sequence

Floats = NDArray[np.float64]

_PRIOR = 8.0  # rows
_KEEP = 0.97  # of what a sequence has shown, per row
_KEEP_SHARED = 0.998
_FIRST_GUESS = (0.5, 0.7)  # right at the first position, and at each later one, before anything
_GUESSED = 8.0  # rows that this counts for


class Curve(NamedTuple):
    """What drafts of one sequence are expected to be worth, by position."""

    survival: Floats  # the probability that it and all before it are right
    proposed: Floats  # the probability that there is a draft at all, if so many are allowed


class Own:
    """What one sequence has shown of one option: rows and right drafts, decayed."""

    __slots__ = ("later", "later_right", "right", "rows")

    def __init__(self) -> None:
        self.rows = self.right = self.later = self.later_right = 0.0


class Acceptance:
    """The shares of all sequences by option and position, and those of each by itself."""

    def __init__(self, options: list[tuple[int, ...]], most: int) -> None:
        self._number = {drafters: i for i, drafters in enumerate(options)}
        shape = len(options), most
        first = np.full(most, _FIRST_GUESS[1])
        first[0] = _FIRST_GUESS[0]
        self._reached = np.full(shape, _GUESSED)  # rows that had all before it right
        self._right = np.tile(first * _GUESSED, (len(options), 1))
        self._allowed = np.full(shape, _GUESSED)  # rows that were allowed so many
        self._drafted = np.full(shape, _GUESSED)

    def learn(
        self,
        sequence: Sequence,
        drafters: tuple[int, ...],
        allowed: int,
        proposed: int,
        accepted: int,
    ) -> None:
        """A row was allowed so many drafts, had so many, and so many of these were right."""
        number = self._number.get(drafters)
        if number is None:
            return  # as its request wanted; nobody else is drafted for like that
        # It got to the position after the last right one, if that was allowed.
        reached = min(accepted + 1, allowed)
        for values, count in (
            (self._reached, reached),
            (self._right, accepted),
            (self._allowed, allowed),
            (self._drafted, proposed),
        ):
            values[number, :count] += 1.0
        for values in (self._reached, self._right, self._allowed, self._drafted):
            values[number] *= _KEEP_SHARED
        own = sequence.shown.setdefault(number, Own())
        own.rows = _KEEP * own.rows + 1.0
        own.right = _KEEP * own.right + (accepted > 0)
        own.later = _KEEP * own.later + reached - 1
        own.later_right = _KEEP * own.later_right + max(accepted - 1, 0)

    def of(self, sequence: Sequence, number: int) -> Curve:
        """What to expect of it by that option."""
        right = self._right[number] / self._reached[number]
        own = sequence.shown.get(number)
        if own is not None:
            first = (_PRIOR * right[0] + own.right) / (_PRIOR + own.rows)
            right = (_PRIOR * right + own.later_right) / (_PRIOR + own.later)
            right[0] = first
        return Curve(np.cumprod(right), self._drafted[number] / self._allowed[number])
