"""`Groups`: what was learnt for groups of sequences; the longest unused is forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Groups(Generic[T]):
    """At most `most` groups."""

    def __init__(self, make: Callable[[], T], most: int = 64) -> None:
        self._make = make
        self._most = most
        self._of: OrderedDict[bytes, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._of)

    def of(self, group: bytes) -> T:
        """That of a group, new if it is not known any more."""
        found = self._of.get(group)
        if found is None:
            if len(self._of) >= self._most:
                self._of.popitem(last=False)
            found = self._of[group] = self._make()
        else:
            self._of.move_to_end(group)
        return found

    def used(self, group: bytes) -> None:
        """It is not to be forgotten yet, if it is known at all."""
        if group in self._of:
            self._of.move_to_end(group)


class Shares:
    """How often guesses of several kinds were right, the older ones counting less."""

    __slots__ = ("_counted", "_right")

    _KEEP = 0.995
    _LOWEST = 0.01  # a kind that is never listened to could not redeem itself

    def __init__(self, kinds: int, first: float, weight: float = 8.0) -> None:
        """`first` is the share before anything is known, which counts for so many guesses."""
        self._counted = [weight] * kinds
        self._right = [weight * first] * kinds

    def __getitem__(self, kind: int) -> float:
        return max(self._right[kind] / self._counted[kind], self._LOWEST)

    def learn(self, kind: int, right: bool) -> None:
        self._counted[kind] = self._KEEP * self._counted[kind] + 1.0
        self._right[kind] = self._KEEP * self._right[kind] + right
