"""How long will it get? The past, as a window of output lengths, and four guesses of length.

Admission (`admission.py`) asks one question of a sequence: how many output tokens will it have when
it ends. What answers is the policy: `PastFuture` draws from the past, `NothingMore`, `AllItMay` and
`Known` are the two stock answers and the simulator's oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.request import FinishReason
from scheduler.sequence import Sequence

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BEYOND = 2**62  # longer than any answer
GOLDEN = 0.6180339887498949  # multiples of it modulo one are spread evenly, however many there are


class LengthGuess(Protocol):
    """Keeps `Sequence.guess`, the output tokens a sequence will have when it ends.

    A guess lies above what the sequence has produced, unless it says that no more will come, and
    never above `Sequence.cap`.
    """

    futures: int  # different ones it can tell, if asked for so many

    def begin(self, sequence: Sequence) -> None:
        """The first guess, when a sequence arrives."""
        ...

    def foresee(self, sequences: list[Sequence], futures: int) -> Ints:
        """Guesses again, given what each has produced since: output lengths, [futures, sequences],
        of which the first become the guesses."""
        ...

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        """Learns from an end."""
        ...


class LengthWindow:
    """The last `size` output lengths, as a survival curve `S(x) = P(length > x)`.

    Lengths cut short by a limit are censored: all that is known is that the answer would have been
    longer. The curve is the product-limit estimate (Kaplan and Meier 1958). `doubt` observations
    that never end stand for what has not been seen: at the start they say "as long as it may", and
    fade as the window fills.
    """

    def __init__(self, size: int = 1000, doubt: float = 4.0) -> None:
        if size < 1 or doubt <= 0:
            raise ValueError("the window needs a size of at least 1 and a positive doubt")
        self._doubt = doubt
        # Length, and whether it was cut short; the `added`-th stands in row `added` modulo `size`.
        self._past = np.zeros((size, 2), dtype=np.int64)
        self.added = 0  # lengths since the start
        self._curve: tuple[Ints, Floats] | None = None

    def __len__(self) -> int:
        return min(self.added, len(self._past))

    def add(self, length: int, cut_short: bool) -> None:
        self._past[self.added % len(self._past)] = length, cut_short
        self.added += 1
        self._curve = None

    def curve(self) -> tuple[Ints, Floats]:
        """Lengths at which answers ended, ascending, and the share that got longer than each.

        Before these, a share of one got longer than nothing; after them stands `BEYOND`.
        """
        if self._curve is None:
            lengths, cut_short = self._past[: len(self)].T
            ends, deaths = np.unique(lengths[cut_short == 0], return_counts=True)
            at_risk = len(self) - np.sort(lengths).searchsorted(ends) + self._doubt
            survival = np.cumprod(1.0 - deaths / at_risk, dtype=np.float64)
            self._curve = np.concatenate((ends, [BEYOND])), np.concatenate(([1.0], survival))
        return self._curve

    def survival(self, length: Ints) -> Floats:
        """The share of answers that get longer than that, for each length."""
        ends, survival = self.curve()
        return survival[ends.searchsorted(length, side="right")]

    def quantile(self, level: Floats, above: Ints, cap: Ints) -> Ints:
        """The length that a share `level`, below one, of all that get longer than `above` outlives,
        or `cap`. All three broadcast.

        With levels spread evenly over (0, 1) these are draws of the length, conditional on what was
        already produced (Past-Future, arXiv 2507.10150). Where the past does not reach, `cap`.
        """
        ends, survival = self.curve()
        # A hair more than the level, so that rounding never skips the end it names.
        reached = level * self.survival(above) * (1 + 1e-12)
        return np.minimum(ends[np.maximum((-survival).searchsorted(-reached), 1) - 1], cap)

    def state(self) -> dict[str, Any]:
        """What to keep between two starts; plain JSON."""
        oldest = self.added % len(self) if len(self) else 0
        return {"version": 1, "lengths": np.roll(self._past[: len(self)], -oldest, axis=0).tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes a kept state back. Raises `ValueError` for anything else."""
        try:
            if state["version"] != 1:
                raise ValueError(f"version {state['version']!r} is unknown")
            past = [(int(length), bool(cut)) for length, cut in state["lengths"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of a length window: {error!r}") from error
        if any(length < 0 for length, _ in past):
            raise ValueError("a length is negative")
        for length, cut in past:
            self.add(length, cut)


class PastFuture:
    """Draws from the lengths of the past, given that a sequence already outlived some of them.

    Draws are sticky: a sequence keeps its place among the lengths of the past (`Sequence.levels`,
    the share of those that got as long as it is which outlive it) as long as it lives. So no
    sequence is admitted for having redrawn. They are dispersed: consecutive sequences get multiples
    of the golden ratio, which cover the distribution evenly, so the sum over a batch is nearer its
    mean than with independent draws. And they are seeded: the same requests give the same
    decisions.

    In the other futures a sequence has other places, spread evenly from its first, in an order of
    its own.
    """

    futures = 8

    def __init__(self, window: LengthWindow, seed: int = 0) -> None:
        self.window = window
        self._rng = np.random.default_rng(seed)
        self._next = float(self._rng.random())

    def begin(self, sequence: Sequence) -> None:
        if sequence.request.params.stop_token_ids:
            self._next = (self._next + GOLDEN) % 1.0
            others = (self._rng.permutation(self.futures - 1) + 1).tolist()
            sequence.levels = tuple((self._next + i / self.futures) % 1.0 for i in (0, *others))
        # As with `ignore_eos`, nothing but the limit ends it.
        self.foresee([sequence], 1)

    def foresee(self, sequences: list[Sequence], futures: int) -> Ints:
        not_drawn = (math.nan,) * futures
        levels = np.array([x for s in sequences for x in s.levels[:futures] or not_drawn])
        levels = levels.reshape(len(sequences), futures).T
        outlived = np.array(
            [max(s.output_len, s.request.params.min_tokens - 1) for s in sequences], dtype=np.int64
        )
        cap = np.array([s.cap for s in sequences], dtype=np.int64)
        drawn = self.window.quantile(levels, outlived, cap)
        lengths = np.where(np.isnan(levels), cap, drawn)
        for s, guess in zip(sequences, lengths[0].tolist(), strict=True):
            s.guess = guess
        return lengths

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.window.add(sequence.output_len, reason is FinishReason.LENGTH)


class NothingMore:
    """Aggressive: what fits now is admitted, and the reserve must do for growth."""

    futures = 1

    def begin(self, sequence: Sequence) -> None:
        sequence.guess = sequence.output_len

    def foresee(self, sequences: list[Sequence], futures: int) -> Ints:
        for sequence in sequences:
            sequence.guess = sequence.output_len
        return _guesses(sequences)

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        pass


class AllItMay:
    """Conservative: every sequence is taken to produce all that it may."""

    futures = 1

    def begin(self, sequence: Sequence) -> None:
        sequence.guess = sequence.cap

    def foresee(self, sequences: list[Sequence], futures: int) -> Ints:
        return _guesses(sequences)

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        pass


class Known:
    """Oracle: the true lengths, by request id. Only a simulation knows them."""

    futures = 1

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = lengths

    def begin(self, sequence: Sequence) -> None:
        sequence.guess = min(self._lengths[sequence.request.id], sequence.cap)

    def foresee(self, sequences: list[Sequence], futures: int) -> Ints:
        return _guesses(sequences)

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        pass


def _guesses(sequences: list[Sequence]) -> Ints:
    return np.array([[sequence.guess for sequence in sequences]], dtype=np.int64)
