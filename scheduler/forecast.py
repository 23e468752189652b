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

Lengths are drawn, so there may be several futures, which differ in how much is to come. All are
counted at once, and the peak is the mean of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
NO_PAGES: Ints = np.zeros((1, 0), dtype=np.int64)
# Steps that pages are held after a sequence's last one: the next step is planned before its result
# is known.
LAG = 1


class Growth(NamedTuple):
    """How one sequence will grow.

    After t of its steps it holds `⌈(length + min(remaining, ⌊pace·t⌋)) / page size⌉ - shared` pages
    of its own, and beyond `end` none.
    """

    length: int  # token positions held now, transient draft slots included
    remaining: Ints  # tokens to come, [futures]
    pace: float  # tokens per step, positive
    shared: int  # of its pages: counted apart

    @property
    def end(self) -> Ints:
        """The last step at which it holds pages, [futures]."""
        return _ends(self.remaining, self.pace)


@dataclass(frozen=True, slots=True)
class Batch:
    """Many `Growth`s, by column."""

    length: Ints  # [sequences]
    remaining: Ints  # [futures, sequences]
    pace: Floats  # [sequences]
    shared: Ints  # [sequences]
    end: Ints  # [futures, sequences]

    @classmethod
    def of(cls, length: Ints, remaining: Ints, pace: Floats, shared: Ints) -> Batch:
        return cls(length, remaining, pace, shared, _ends(remaining, pace))

    def plus(self, growth: Growth) -> Batch:
        length, remaining, pace, shared = growth
        return Batch(
            np.concatenate((self.length, [length])),
            _with_column(self.remaining, remaining),
            np.concatenate((self.pace, [pace])),
            np.concatenate((self.shared, [shared])),
            _with_column(self.end, growth.end),
        )


def _ends(remaining: Ints, pace: Floats | float) -> Ints:
    return np.ceil(remaining / pace).astype(np.int64) + LAG


def _with_column(table: Ints, column: Ints) -> Ints:
    return np.concatenate((table, column[:, None]), axis=1)


def pages_at(batch: Batch, now: Ints, page_size: int) -> Ints:
    """Pages of its own that a batch holds after `now` steps, ends at that instant not yet over.
    By future, of which each has a `now`."""
    now = now[:, None]
    grown = np.minimum(batch.remaining, (batch.pace * now).astype(np.int64))
    held = (batch.length + grown + page_size - 1) // page_size - batch.shared
    return np.asarray((held * (batch.end >= now)).sum(axis=1))


def pages_at_ends(batch: Batch, page_size: int) -> Ints:
    """The same for all of its ends at once, [futures, sequences].

    Who lives on beyond t has grown by the same ⌊pace·t⌋ as all others of its pace. So of a sum of
    rounded quotients only the remainders depend on t, and they are counted by residue class: this
    costs O(n · page size) per distinct pace, where adding up batches would cost O(n²).
    """
    futures, count = batch.end.shape
    # One line of time for all futures, one after the other: a row for each end, equal ones share
    # the first.
    apart = np.arange(futures)[:, None] * (batch.end.max(initial=0) + 1)
    line = np.sort(batch.end + apart, axis=None)
    rows = line.searchsorted(batch.end + apart)
    times = line.reshape(futures, count) - apart
    # Rounded up to pages, and without what is counted apart.
    begun = batch.length - page_size * batch.shared + (page_size - 1)
    last = (begun + batch.remaining) // page_size
    held = np.bincount(rows.ravel(), last.ravel(), line.size)  # who ends then
    residues = np.arange(page_size)
    start = np.broadcast_to(begun, rows.shape)
    for pace in set(batch.pace.tolist()):
        of_pace = batch.pace == pace
        own, ends = start[:, of_pace].ravel(), rows[:, of_pace].ravel()
        # By time: what those who live on began with, and how many there are of each residue.
        sums = np.bincount(ends, own, line.size).reshape(times.shape)
        classes = np.bincount(
            ends * page_size + own % page_size, minlength=line.size * page_size
        ).reshape(futures, count, page_size)
        sums, classes = _beyond(sums).astype(np.int64), _beyond(classes)
        grown = (pace * times).astype(np.int64)[:, :, None]
        sums += (classes * (grown - (residues + grown) % page_size)).sum(axis=2)
        held += (sums // page_size).ravel()
    # Of those in their last step, who then has all its tokens has grown by fewer than its pace.
    final = batch.end - LAG
    full = (batch.pace * final).astype(np.int64)
    if (full != batch.remaining).any():
        rows_then = np.minimum(line.searchsorted(final + apart), line.size - 1)
        mended = line[rows_then] == final + apart
        over = (begun + full) // page_size - last
        held -= np.bincount(rows_then[mended], over[mended], line.size)
    return held.astype(np.int64)[rows]


def _beyond(sums: Any) -> Any:
    """By row: the sum of the later ones of its future."""
    return sums.sum(axis=1, keepdims=True) - sums.cumsum(axis=1)


class Forecast:
    """Pages held at each end to come, and what one more sequence would make of the peak.

    `shared_ends`, [futures, pages]: for each page of `Growth.shared`, once: the step at which the
    last of those who hold it ends. Made in O(n log n), asked and added to in O(n).
    """

    __slots__ = ("_batch", "_held", "_kept", "_page_size", "_peaks", "_shared_ends")

    def __init__(self, batch: Batch, page_size: int, shared_ends: Ints = NO_PAGES) -> None:
        self._batch = batch
        self._page_size = page_size
        self._shared_ends = np.sort(shared_ends)
        self._kept: list[tuple[Ints, Ints]] = []  # ends and `held_ends` of those who joined
        self._held = pages_at_ends(batch, page_size) + self._shared_at(batch.end)
        self._peaks: Ints = self._held.max(axis=1, initial=0)

    @property
    def peak(self) -> int:
        """Pages held at most from now on, in the mean, rounded up."""
        return _mean(self._peaks)

    def fits(self, growth: Growth, held_ends: Ints, limit: int) -> bool:
        """Whether `peak_with` is at most `limit`; most candidates need no closer look."""
        if self.peak > limit:
            return False
        size = self._page_size
        final = (growth.length + growth.remaining + size - 1) // size
        most = self._peaks + final - growth.shared + held_ends.shape[1]
        if _mean(most) <= limit:
            return True  # even if it held at the peak all that it ever will
        return self.peak_with(growth, held_ends) <= limit

    def peak_with(self, growth: Growth, held_ends: Ints = NO_PAGES) -> int:
        """The peak if this sequence joined now.

        `held_ends`, [futures, pages]: for each page that it would share, the step at which others
        let go of it.
        """
        then, during = self._with(growth, np.sort(held_ends))
        return _mean(np.maximum(then, during.max(axis=1, initial=0)))

    def add(self, growth: Growth, held_ends: Ints = NO_PAGES) -> None:
        """Lets the sequence join."""
        held_ends = np.sort(held_ends)
        then, during = self._with(growth, held_ends)
        self._held = _with_column(during, then)
        self._peaks = self._held.max(axis=1)
        self._batch = self._batch.plus(growth)
        if held_ends.size:
            self._kept.append((growth.end, held_ends))

    def _with(self, growth: Growth, held_ends: Ints) -> tuple[Ints, Ints]:
        """Pages held at the end of the sequence if it joined, [futures], and at the other ends."""
        times, end = self._batch.end, growth.end
        brought = self._brings(growth, held_ends, times)
        during = self._held + brought * (times <= end[:, None])
        return self._at(end) + self._brings(growth, held_ends, end[:, None])[:, 0], during

    def _at(self, now: Ints) -> Ints:
        """Pages held after `now` steps, a number for each future."""
        held = pages_at(self._batch, now, self._page_size)
        if self._shared_ends.size:
            held += self._shared_at(now[:, None])[:, 0]
        for end, held_ends in self._kept:
            held += _over(held_ends, now[:, None])[:, 0] * (now <= end)
        return held

    def _shared_at(self, times: Ints) -> Ints:
        if not self._shared_ends.size:
            return np.zeros((1, 1), dtype=np.int64)
        return self._shared_ends.shape[1] - _over(self._shared_ends, times)

    def _brings(self, growth: Growth, held_ends: Ints, times: Ints) -> Ints:
        """Pages the sequence adds at these times, none of them after its end: its own, and shared
        ones that everybody else has let go of."""
        grown = np.minimum(growth.remaining[:, None], (growth.pace * times).astype(np.int64))
        held = (growth.length + grown + self._page_size - 1) // self._page_size - growth.shared
        return held + _over(held_ends, times) if held_ends.size else held


def _mean(pages: Ints) -> int:
    return -int(-pages.sum() // len(pages))


def _over(ends: Ints, times: Ints) -> Ints:
    """How many of the ends, ascending, lie before each time; by future."""
    return np.stack([of.searchsorted(t) for of, t in zip(ends, times, strict=True)])
