"""How long will it get? The past, as a window of output lengths, and four guesses of length.

Admission (`admission.py`) asks one question of a sequence: how many output tokens will it have when
it ends. What answers is the policy: `PastFuture` draws from the past, `NothingMore`, `AllItMay` and
`Known` are the two stock answers and the simulator's oracle.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from operator import neg
from typing import Any, Protocol

import numpy as np

from scheduler.request import FinishReason
from scheduler.sequence import Sequence

GOLDEN = 0.6180339887498949  # multiples of it modulo one are spread evenly, however many there are


class LengthGuess(Protocol):
    """Keeps `Sequence.guess`, the output tokens a sequence will have when it ends.

    A guess lies above what the sequence has produced, unless it says that no more will come, and
    never above `Sequence.cap`.
    """

    def begin(self, sequence: Sequence) -> None:
        """The first guess, when a sequence arrives."""
        ...

    def update(self, sequences: list[Sequence]) -> None:
        """Guesses again, given what each has produced since."""
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
        self._curve: tuple[list[int], list[float]] | None = None

    def __len__(self) -> int:
        return min(self.added, len(self._past))

    def add(self, length: int, cut_short: bool) -> None:
        self._past[self.added % len(self._past)] = length, cut_short
        self.added += 1
        self._curve = None

    def curve(self) -> tuple[list[int], list[float]]:
        """Lengths at which answers ended, ascending, and the share that got longer than each."""
        if self._curve is None:
            lengths, cut_short = self._past[: len(self)].T
            ends, deaths = np.unique(lengths[cut_short == 0], return_counts=True)
            at_risk = len(self) - np.sort(lengths).searchsorted(ends) + self._doubt
            self._curve = ends.tolist(), np.cumprod(1.0 - deaths / at_risk).tolist()
        return self._curve

    def survival(self, length: int) -> float:
        """The share of answers that get longer than that."""
        ends, survival = self.curve()
        before = bisect_right(ends, length)
        return survival[before - 1] if before else 1.0

    def quantile(self, level: float, above: int, cap: int) -> int:
        """The length that a share `level` of all that get longer than `above` outlives, or `cap`.

        With levels spread evenly over (0, 1) these are draws of the length, conditional on what was
        already produced (Past-Future, arXiv 2507.10150). Where the past does not reach, `cap`.
        """
        ends, survival = self.curve()
        # A hair more than the level, so that rounding never skips the end it names.
        reached = level * self.survival(above) * (1 + 1e-12)
        where = bisect_left(survival, -reached, key=neg)
        return min(ends[where], cap) if where < len(ends) else cap

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

    Draws are sticky: a sequence keeps its place among the lengths of the past (`Sequence.level`,
    the share that outlives it) until it outlives it itself; only then is another one drawn. So no
    sequence is admitted for having redrawn, and the forecast stands still while it comes true.
    They are dispersed: consecutive sequences get multiples of the golden ratio, which cover the
    distribution evenly, so the sum over a batch is nearer its mean than with independent draws.
    And they are seeded: the same requests give the same decisions.
    """

    def __init__(self, window: LengthWindow, seed: int = 0) -> None:
        self.window = window
        self._next = float(np.random.default_rng(seed).random())

    def _draw(self) -> float:
        self._next = (self._next + GOLDEN) % 1.0
        return self._next

    def begin(self, sequence: Sequence) -> None:
        params = sequence.request.params
        if not params.stop_token_ids:  # as with `ignore_eos`: nothing but the limit ends it
            sequence.guess = sequence.cap
            return
        sequence.level = self._draw()
        sequence.outlived = max(sequence.output_len, params.min_tokens - 1, 0)
        self._guess(sequence)

    def update(self, sequences: list[Sequence]) -> None:
        """Of whoever outlived its guess, or made it before a twentieth of the window was new."""
        stale = self.window.added - len(self.window) // 20
        for s in sequences:
            if s.guessed_at < stale or s.guess <= len(s.tokens) - s.prompt_len:
                self._guess(s)

    def _guess(self, sequence: Sequence) -> None:
        window, cap, produced = self.window, sequence.cap, sequence.output_len
        sequence.guessed_at = window.added
        if sequence.level is None:
            return  # it was not drawn
        sequence.guess = window.quantile(sequence.level, sequence.outlived, cap)
        if sequence.guess <= produced < cap:
            sequence.level, sequence.outlived = self._draw(), produced
            sequence.guess = window.quantile(sequence.level, produced, cap)

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.window.add(sequence.output_len, reason is FinishReason.LENGTH)


class NothingMore:
    """Aggressive: what fits now is admitted, and the reserve must do for growth."""

    def begin(self, sequence: Sequence) -> None:
        sequence.guess = sequence.output_len

    def update(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.guess = sequence.output_len

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        pass


class AllItMay:
    """Conservative: every sequence is taken to produce all that it may."""

    def begin(self, sequence: Sequence) -> None:
        sequence.guess = sequence.cap

    def update(self, sequences: list[Sequence]) -> None:
        pass

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        pass


class Known:
    """Oracle: the true lengths, by request id. Only a simulation knows them."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = lengths

    def begin(self, sequence: Sequence) -> None:
        sequence.guess = min(self._lengths[sequence.request.id], sequence.cap)

    def update(self, sequences: list[Sequence]) -> None:
        pass

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        pass
