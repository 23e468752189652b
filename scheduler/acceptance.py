"""`Acceptance`: how many drafts turn out right, from what became of earlier ones.

A draft counts only if all before it are right. So for each option (an order of drafters) and each
position two shares are kept, of the rows that got as far as that position: how many had a draft
there at all, since drafters may have nothing to say or stop early, and how many had a right one.

All sequences together give these shares by position, in the short run. One sequence gives few, so
it has two numbers of its own, for the first position and for all later ones, that pull the shared
ones towards itself the more it has shown.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.plan import Shadow
from scheduler.sequence import Sequence

Floats = NDArray[np.float64]

_PRIOR = 4.0  # rows of its own that weigh as much as what all have shown
_KEEP = 0.92  # of what a sequence has shown, per row
_KEEP_SHARED = 0.99
_KEEP_PER_TEXT = 0.7  # whoever writes without drafts should notice soon that they would be right
_LARGEST = 1e9  # weights are scaled down beyond that
_FIRST_GUESS = (0.6, 0.8)  # right at the first position, and at each later one, before anything
_GUESSED = 2.0  # rows that this counts for


class Curves(NamedTuple):
    """What drafts of some sequences are expected to be worth, by position."""

    survival: Floats  # [sequences, positions]: that it and all before it are right
    proposed: Floats  # [positions]: that there is one at all, if so many are allowed


class Own:
    """What one sequence has shown of one option: rows and right drafts, decayed."""

    __slots__ = ("later", "later_right", "right", "rows")

    def __init__(self) -> None:
        self.rows = self.right = self.later = self.later_right = 0.0


class _Shared:
    """The same of all sequences: of how many rows each number of drafts was allowed, reached, right
    and drafted. What is older weighs less: the weight of a row grows from row to row, which is the
    same and leaves the others alone."""

    def __init__(self, most: int) -> None:
        self.weight = 1.0
        self.reached = [0.0] * (most + 1)  # one more than were right, if so many were allowed
        self.right = [0.0] * (most + 1)
        self.allowed = [0.0] * (most + 1)
        self.drafted = [0.0] * (most + 1)

    def grow(self, keep: float = _KEEP_SHARED) -> None:
        self.weight /= keep
        if self.weight > _LARGEST:
            for values in (self.reached, self.right, self.allowed, self.drafted):
                values[:] = [value / self.weight for value in values]
            self.weight = 1.0

    def shares(self) -> tuple[Floats, Floats]:
        """By position: how many of those that reached it were right, and how many of those allowed
        were drafted. What is not known is guessed."""
        guessed = _GUESSED * self.weight
        guess = np.full(len(self.right) - 1, _FIRST_GUESS[1])
        guess[0] = _FIRST_GUESS[0]
        right = (guessed * guess + _beyond(self.right)) / (guessed + _beyond(self.reached))
        drafted = (guessed + _beyond(self.drafted)) / (guessed + _beyond(self.allowed))
        return right, drafted


def _beyond(rows: list[float]) -> Floats:
    """Rows by number of drafts -> by position, those with a draft there."""
    return np.cumsum(rows[:0:-1])[::-1]


def _odds(share: Floats) -> Floats:
    return share / (1.0 - share)


class Acceptance:
    """Of all options."""

    def __init__(self, options: Items[tuple[int, ...]], most: int) -> None:
        self._number = {drafters: i for i, drafters in enumerate(options)}
        self._shared = [_Shared(most) for _ in options]

    def number(self, drafters: tuple[int, ...]) -> int | None:
        """The option in which these are asked."""
        return self._number.get(drafters)

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
            return
        self._count(number, allowed, proposed, accepted)
        reached = min(accepted + 1, allowed)
        own = sequence.shown.get(number)
        if own is None:
            own = sequence.shown[number] = Own()
        own.rows = _KEEP * own.rows + 1.0
        own.right = _KEEP * own.right + (accepted > 0)
        own.later = _KEEP * own.later + reached - 1
        own.later_right = _KEEP * own.later_right + max(accepted - 1, 0)

    def learn_from(self, shadow: Shadow, most: int) -> None:
        """A text that was written without drafts, as if it had been written with as many as may
        be, by that drafter alone."""
        number = self._number.get((shadow.drafter,))
        if number is None:
            return
        self._shared[number].grow(_KEEP_PER_TEXT)
        at = 0
        while at < len(shadow.right):
            accepted = 0
            while accepted < most and shadow.right[at + accepted : at + accepted + 1] == (True,):
                accepted += 1
            self._count(number, most, most, accepted)
            at += accepted + 1

    def _count(self, number: int, allowed: int, proposed: int, accepted: int) -> None:
        shared = self._shared[number]
        weight = shared.weight
        shared.allowed[allowed] += weight
        # It got to the position after the last right one, if that was allowed.
        shared.reached[min(accepted + 1, allowed)] += weight
        shared.right[accepted] += weight
        shared.drafted[min(proposed, allowed)] += weight
        shared.grow()

    def newcomer(self, number: int) -> Floats:
        """[positions]: the survival to expect of one that has shown nothing yet."""
        right, _ = self._shared[number].shares()
        return np.asarray(np.cumprod(right))

    def curves(self, sequences: Items[Sequence], number: int) -> Curves:
        """What to expect of each by that option."""
        shared = self._shared[number]
        right, proposed = shared.shares()
        owns = [sequence.shown.get(number) or _NOTHING for sequence in sequences]
        own = np.array([(o.rows, o.right, o.later, o.later_right) for o in owns])
        rows, first, later, later_right = own.T
        conditional = np.empty((len(owns), len(right)))
        conditional[:, 0] = (_PRIOR * right[0] + first) / (_PRIOR + rows)
        # Whose first drafts are right less often than others' will have fewer right later, too.
        odds = _odds(conditional[:, :1]) / _odds(right[0]) * _odds(right[1:])
        expected = odds / (1.0 + odds)
        conditional[:, 1:] = (_PRIOR * expected + later_right[:, None]) / (_PRIOR + later[:, None])
        return Curves(np.asarray(np.cumprod(conditional, axis=1)), proposed)


_NOTHING = Own()
