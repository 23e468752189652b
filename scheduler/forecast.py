"""The future: how many pages a batch will hold, if every sequence gets as long as guessed.

    pages                     ┌┐ peak
      │                  ┌────┘│
      │          ┌──┐┌───┘     └──┐
      │     ┌────┘  └┘            │
      │─────┘                     └─────┐
      └──────────┴────────────────┴─────┴──▶
           first end              ...    steps

A sequence holds pages for what it has, and one more each time it has filled one, until it ends.
Between two ends the sum only grows, so its maximum lies at an end: there are no more instants to
look at than sequences.

Time is counted in steps, not tokens, for under speculation sequences advance at different rates.
The peak over ends is the Past-Future scheduler's (arXiv 2507.10150); rates, page rounding and
shared prefixes are added here. Pages of a shared prefix are counted apart from those of the
sequences that hold them: once, until the last of these ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
NO_PAGES: Ints = np.zeros(0, dtype=np.int64)
# Steps that pages are held after a sequence's last one: the next step is planned before its result
# is known.
LAG = 1


class Growth(NamedTuple):
    """How one sequence will grow.

    After t of its steps it holds `⌈(length + min(remaining, ⌊pace·t⌋)) / page size⌉ - shared` pages
    of its own, and beyond `end` none.
    """

    length: int  # token positions held now, transient draft slots included
    remaining: int  # tokens to come
    pace: float  # tokens per step, positive
    shared: int  # of its pages: counted apart

    @property
    def end(self) -> int:
        """The last step at which it holds pages."""
        return LAG - int(-self.remaining // self.pace)


@dataclass(frozen=True, slots=True)
class Batch:
    """Many `Growth`s, by column."""

    length: Ints
    remaining: Ints
    pace: Floats
    shared: Ints
    end: Ints

    @classmethod
    def of(cls, length: Ints, remaining: Ints, pace: Floats, shared: Ints) -> Batch:
        return cls(
            length, remaining, pace, shared, np.ceil(remaining / pace).astype(np.int64) + LAG
        )

    def plus(self, growth: Growth) -> Batch:
        length, remaining, pace, shared = growth
        return Batch(
            np.concatenate((self.length, [length])),
            np.concatenate((self.remaining, [remaining])),
            np.concatenate((self.pace, [pace])),
            np.concatenate((self.shared, [shared])),
            np.concatenate((self.end, [growth.end])),
        )


def pages_at(batch: Batch, now: int, page_size: int) -> int:
    """Pages of its own that a batch holds after `now` steps, ends at that instant not yet over."""
    grown = np.minimum(batch.remaining, (batch.pace * now).astype(np.int64))
    held = (batch.length + grown + page_size - 1) // page_size - batch.shared
    return int(held[batch.end >= now].sum())


def pages_at_ends(batch: Batch, times: Ints, page_size: int) -> Ints:
    """The same for all of its ends at once; `times` are these, ascending and distinct.

    Who lives on beyond t has grown by the same ⌊pace·t⌋ as all others of its pace. So of a sum of
    rounded quotients only the remainders depend on t, and they are counted by residue class: this
    costs O(n · page size) per distinct pace, where adding up batches would cost O(n²).
    """
    count = len(times)
    rows = times.searchsorted(batch.end)
    # Rounded up to pages, and without what is counted apart.
    begun = batch.length - page_size * batch.shared + (page_size - 1)
    last = (begun + batch.remaining) // page_size
    held = np.bincount(rows, last, count).astype(np.int64)  # who ends then
    residues = np.arange(page_size)
    for pace in set(batch.pace.tolist()):
        of_pace = batch.pace == pace
        start, ends = begun[of_pace], rows[of_pace]
        # By time: what those who live on began with, and how many there are of each residue.
        sums = np.bincount(ends, start, count).astype(np.int64)
        classes = np.bincount(ends * page_size + start % page_size, minlength=count * page_size)
        sums, classes = _beyond(sums), _beyond(classes.reshape(-1, page_size))
        grown = (pace * times).astype(np.int64)[:, None]
        sums += (classes * (grown - (residues + grown) % page_size)).sum(axis=1)
        held += sums // page_size
    # Of those in their last step, who then has all its tokens has grown by fewer than its pace.
    final = batch.end - LAG
    full = (batch.pace * final).astype(np.int64)
    if (full != batch.remaining).any():
        rows = times.searchsorted(final)
        mended = times[rows] == final
        over = (begun + full) // page_size - last
        held -= np.bincount(rows[mended], over[mended], count).astype(np.int64)
    return held


def _beyond(sums: Ints) -> Ints:
    """By row: the sum of the later ones."""
    return np.asarray(sums.sum(axis=0) - sums.cumsum(axis=0))


def _inserted(values: Ints, where: int, value: int) -> Ints:
    """What `np.insert` returns, in a fifth of its time."""
    return np.concatenate((values[:where], [value], values[where:]))


class Forecast:
    """Pages held at each end to come, and what one more sequence would make of the peak.

    `shared_ends`: for each page of `Growth.shared`, once: the step at which the last of those who
    hold it ends. Made in O(n log n), asked and added to in O(n).
    """

    __slots__ = ("_batch", "_held", "_kept", "_page_size", "_shared_ends", "_times")

    def __init__(self, batch: Batch, page_size: int, shared_ends: Ints = NO_PAGES) -> None:
        self._batch = batch
        self._page_size = page_size
        self._shared_ends = np.sort(shared_ends)
        self._kept: list[tuple[int, Ints]] = []  # ends and `held_ends` of those who joined
        self._times: Ints = np.unique(batch.end)
        self._held = pages_at_ends(batch, self._times, page_size) + self._shared_at(self._times)

    @property
    def peak(self) -> int:
        """Pages held at most from now on."""
        return int(self._held.max(initial=0))

    def fits(self, growth: Growth, held_ends: Ints, limit: int) -> bool:
        """Whether `peak_with` is at most `limit`; most candidates need no closer look."""
        size = self._page_size
        final = (growth.length + growth.remaining + size - 1) // size
        if self.peak + final - growth.shared + len(held_ends) <= limit:
            return True  # even if it held at the peak all that it ever will
        if self.peak > limit:
            return False
        alive = int(np.searchsorted(self._times, growth.end, side="right"))
        own = (growth.length + size - 1) // size - growth.shared
        if alive and int(self._held[:alive].max()) + own > limit:
            return False  # even if it never grew
        return self.peak_with(growth, held_ends) <= limit

    def peak_with(self, growth: Growth, held_ends: Ints = NO_PAGES) -> int:
        """The peak if this sequence joined now.

        `held_ends`: for each page that it would share, the step at which others let go of it.
        """
        end = growth.end
        alive = int(np.searchsorted(self._times, end, side="right"))
        during = self._held[:alive] + self._brings(growth, held_ends, self._times[:alive])
        then = self._at(end) + int(self._brings(growth, held_ends, np.array([end]))[0])
        return max(then, int(during.max(initial=0)), int(self._held[alive:].max(initial=0)))

    def add(self, growth: Growth, held_ends: Ints = NO_PAGES) -> None:
        """Lets the sequence join."""
        end = growth.end
        where = int(np.searchsorted(self._times, end))
        if where == len(self._times) or self._times[where] != end:
            self._held = _inserted(self._held, where, self._at(end))
            self._times = _inserted(self._times, where, end)
        self._held[: where + 1] += self._brings(growth, held_ends, self._times[: where + 1])
        self._batch = self._batch.plus(growth)
        if len(held_ends):
            self._kept.append((end, np.sort(held_ends)))

    def _at(self, now: int) -> int:
        """Pages held after `now` steps."""
        kept = sum(int(np.searchsorted(held, now)) for end, held in self._kept if now <= end)
        shared = int(self._shared_at(np.array([now]))[0]) if len(self._shared_ends) else 0
        return pages_at(self._batch, now, self._page_size) + shared + kept

    def _shared_at(self, times: Ints) -> Ints:
        return len(self._shared_ends) - np.searchsorted(self._shared_ends, times)

    def _brings(self, growth: Growth, held_ends: Ints, times: Ints) -> Ints:
        """Pages the sequence adds at these times, none of them after its end: its own, and shared
        ones that everybody else has let go of."""
        grown = np.minimum(growth.remaining, (growth.pace * times).astype(np.int64))
        held = (growth.length + grown + self._page_size - 1) // self._page_size - growth.shared
        if len(held_ends):
            held += np.searchsorted(np.sort(held_ends), times)
        return held
