"""May one more sequence run? One test for every policy: the forecast's peak against the pool."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from scheduler.forecast import NO_PAGES, Batch, Floats, Forecast, Growth, Ints
from scheduler.lengths import AllItMay, Known, LengthGuess, LengthWindow, NothingMore, PastFuture
from scheduler.pages import PagePool
from scheduler.sequence import Sequence

IN_FLIGHT = 1  # positions a launched row writes beyond the tokens that count
NOBODY = -1  # in place of an end: no page that others hold
FORECAST_SIZE = 128  # sequences times futures of a forecast that tells several


class Reserve(Protocol):
    """The share of all pages that admission leaves free."""

    def share(self, running: int) -> float:
        """While so many sequences run."""
        ...

    def evicted(self) -> None:
        """A sequence was preempted for want of pages, or pages of it were demoted."""
        ...

    def finished(self) -> None:
        """A sequence ended."""
        ...


class Watermark:
    """A fixed share."""

    def __init__(self, share: float) -> None:
        self._share = share

    def share(self, running: int) -> float:
        return self._share

    def evicted(self) -> None:
        pass

    def finished(self) -> None:
        pass


@dataclass(slots=True)
class AdaptiveReserve:
    """Finds the reserve under which `target` evictions come on one end of a sequence.

    How far the sum of n lengths strays from its forecast, as a share of itself, falls with the root
    of n; so the reserve is `spread / √n`. Each eviction widens the spread by `gain`, each end
    narrows it by `gain · target`; the two balance where evictions per end equal the target
    (stochastic approximation, Robbins and Monro 1951).
    """

    spread: float = 0.3
    gain: float = 0.015
    target: float = 0.015
    most: float = 0.3  # share of all pages, however few run

    def share(self, running: int) -> float:
        return min(self.spread / math.sqrt(max(running, 1)), self.most)

    def evicted(self) -> None:
        self.spread += self.gain

    def finished(self) -> None:
        self.spread = max(self.spread - self.gain * self.target, 0.0)


@dataclass(frozen=True, slots=True)
class Policy:
    """What tells one admission policy from another: whose guess of length, and what is spared."""

    lengths: LengthGuess
    reserve: Reserve
    window: LengthWindow | None = None  # the past it learns from, to be kept between starts


POLICIES = ("past-future", "aggressive", "conservative")  # "oracle" needs to be told the truth


def make_policy(
    name: str = "past-future",
    *,
    watermark: float = 0.05,
    window: int = 1000,
    seed: int = 0,
    truth: Mapping[str, int] | None = None,
) -> Policy:
    """The policy of that name.

    `watermark` is the share of pages `aggressive` keeps free, `window` how many past lengths
    `past-future` remembers, `truth` the output lengths by request id that `oracle` is told. Raises
    `ValueError` for an unknown name, an impossible number, or an oracle without truth.
    """
    if not 0 <= watermark < 1:
        raise ValueError(f"the watermark must be in [0, 1), not {watermark}")
    match name:
        case "past-future":
            past = LengthWindow(window)
            return Policy(PastFuture(past, seed), AdaptiveReserve(), past)
        case "aggressive":
            return Policy(NothingMore(), Watermark(watermark))
        case "conservative":
            return Policy(AllItMay(), Watermark(0.0))
        case "oracle":
            if truth is None:
                raise ValueError("the oracle needs to be told the true lengths: simulation only")
            return Policy(Known(truth), Watermark(0.0))
    raise ValueError(f"unknown policy {name!r}; there are {', '.join(POLICIES)} and oracle")


class _Asked(NamedTuple):
    """What a candidate would bring."""

    growth: Growth
    ends: Ints  # [futures, hits]: when others let go of the page, or `NOBODY`

    @property
    def held_ends(self) -> Ints:
        """See `Forecast.peak_with`: a page is held in all futures, or in none."""
        return self.ends[:, self.ends[0] > NOBODY]


_NOTHING = _Asked(Growth(0, np.zeros(1, dtype=np.int64), 1.0, 0), NO_PAGES)


class Admission:
    """The admission test of one pool.

    `survey` starts a pass over the queue; `fits` asks about a candidate, whom `admit` lets in for
    the questions after it. The forecast is made when first asked for.

    Where few sequences run, one draw of their lengths says little of their sum, so there the
    forecast is of several futures: as many as cost no more than the one of a large batch.
    """

    def __init__(self, policy: Policy, pool: PagePool, page_size: int) -> None:
        self.policy = policy
        self._pool = pool
        self._page_size = page_size
        self._running: list[Sequence] = []
        self._forecast: Forecast | None = None
        self._futures = 1  # that the forecast tells
        # By future, by page: when the last of its several holders ends.
        self._page_ends: list[dict[int, int]] = []
        self._asked = _NOTHING  # of the last candidate
        self.peak = 0  # pages that the last forecast saw held at once

    @property
    def reserved(self) -> int:
        """Pages that no candidate's peak may reach into."""
        return int(self.policy.reserve.share(len(self._running)) * self._pool.total)

    def survey(self, running: list[Sequence]) -> None:
        """`running` are those who run already; nothing is kept of an earlier pass."""
        self._running = running
        self._forecast = None

    def fits(self, sequence: Sequence, hits: list[int], spare: int = 0) -> bool:
        """Whether the peak stays under the reserve if it joins, on these pages of a cached prefix,
        and leaves `spare` pages more.

        Always true for whoever would be alone.
        """
        forecast = self._forecast
        if forecast is None:
            if not self._running:
                return True
            forecast = self._forecast = self._make()
            self.peak = forecast.peak
        asked = self._asked = self._ask(sequence, hits)
        limit = self._pool.total - self.reserved - spare
        return forecast.fits(asked.growth, asked.held_ends, limit)

    def admit(self, sequence: Sequence, hits: list[int]) -> None:
        """The candidate joins, who was asked about last."""
        forecast = self._forecast
        if forecast is None:
            forecast = self._forecast = self._make()
            self._asked = self._ask(sequence, hits)
        asked = self._asked
        forecast.add(asked.growth, asked.held_ends)
        self.peak = forecast.peak
        if hits:
            ends = np.maximum(asked.ends, asked.growth.end[:, None]).tolist()
            for page_ends, of in zip(self._page_ends, ends, strict=True):
                page_ends.update(zip(hits, of, strict=True))

    def first_ends(self, running: list[Sequence]) -> Floats | None:
        """Steps until the first sequence up to each one ends, in the mean of the futures; None if
        there is one only, or no telling."""
        futures = self._futures_of(len(running))
        if futures == 1:
            return None
        outputs = self.policy.lengths.foresee(running, futures)
        left = outputs - np.array([s.output_len for s in running])
        steps = left / np.array([s.pace for s in running])
        return np.asarray(np.minimum.accumulate(steps, axis=1).mean(axis=0))

    def _futures_of(self, running: int) -> int:
        """How many a forecast tells of so many sequences."""
        return max(min(FORECAST_SIZE // max(running, 1), self.policy.lengths.futures), 1)

    def _make(self) -> Forecast:
        """The forecast for those who run, and the ends of the pages they share."""
        running, pool = self._running, self._pool
        self._futures = self._futures_of(len(running))
        if pool.sharing:
            shared = np.array([pool.shared(s.pages) for s in running], dtype=np.int64)
        else:
            shared = np.zeros(len(running), dtype=np.int64)
        length = np.array([len(s.tokens) for s in running], dtype=np.int64) + IN_FLIGHT
        pace = np.array([s.pace for s in running], dtype=np.float64)
        batch = Batch.of(length, np.maximum(self._final(running) - length, 0), pace, shared)
        self._page_ends = []
        sharers = np.flatnonzero(shared)
        for end in batch.end:
            ends: dict[int, int] = {}
            for i in sharers[np.argsort(end[sharers])].tolist():  # the last to end has its say
                ends.update(dict.fromkeys(running[i].pages[: shared[i]], int(end[i])))
            self._page_ends.append(ends)
        shared_ends = np.array([list(ends.values()) for ends in self._page_ends], dtype=np.int64)
        return Forecast(batch, self._page_size, shared_ends)

    def _final(self, sequences: list[Sequence]) -> Ints:
        """Positions each takes up when it ends, [futures, sequences]; at its limit, the last
        token's are never computed."""
        prompt = np.array([s.prompt_len for s in sequences], dtype=np.int64)
        limit = np.array([s.limit for s in sequences], dtype=np.int64)
        outputs = self.policy.lengths.foresee(sequences, self._futures)
        return np.minimum(prompt + outputs + IN_FLIGHT, limit)

    def _ask(self, sequence: Sequence, hits: list[int]) -> _Asked:
        length = len(sequence.tokens) + IN_FLIGHT
        remaining = np.maximum(self._final([sequence])[:, 0] - length, 0)
        if not hits:
            return _Asked(Growth(length, remaining, sequence.pace, 0), NO_PAGES)
        ends = np.array([[of.get(page, NOBODY) for page in hits] for of in self._page_ends])
        if self._pool.held(hits[0]) and ends.min() == NOBODY:
            self._ask_owners(hits, ends)
        shared = int(np.count_nonzero(ends[0] > NOBODY))
        return _Asked(Growth(length, remaining, sequence.pace, shared), ends)

    def _ask_owners(self, hits: list[int], ends: Ints) -> None:
        """Fills in the ends of pages that have a single holder so far.

        Who holds a page of a prefix holds those before it, so the first page tells whom to ask.
        """
        for holder in self._running:
            pages = holder.pages
            if pages and pages[0] == hits[0]:
                # Equal up to some page, different from there on.
                equal = bisect_left(
                    range(min(len(pages), len(hits))), True, key=lambda i: pages[i] != hits[i]
                )
                end = self._ask(holder, []).growth.end[:, None]
                np.maximum(ends[:, :equal], end, out=ends[:, :equal])
