"""`StepCost`: the seconds a step will take, from a profile and from the steps that were run.

    seconds = (base(tokens) + a · decode_context + b · chunk_pairs + c · rows) · correction

`base` is monotone and piecewise linear; a, b, c and its slopes are fitted, none negative, so a
step never gets cheaper by doing more. The correction follows the machine as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scheduler.fit import Curve, fit_curve
from scheduler.profile import Profile, ProfileError, StepShape, chunk_pairs

__all__ = ["UNLIMITED", "Profile", "ProfileError", "StepCost", "StepShape", "chunk_pairs"]

UNLIMITED = 1 << 30  # tokens: more than any step has

_RATE = 0.1  # of the logarithm of the correction, per step
_CLIP = 0.5  # at most so much of that logarithm is believed of one step: outliers hardly count
_BOUND = 5.0  # of the logarithm: a machine is at most 150 times slower or faster than its profile
# Between two fits of what is learnt there are so many steps; fewer at first, and for new shapes.
_REFIT = 512
_EARLY = 64  # steps


class StepCost:
    """Predictions of step times, corrected by the times observed.

    From a profile it is right from the start. `learning()` has no profile: before its first step
    it predicts 0 seconds, so that `tokens_within` allows everything; see `ready`.
    """

    def __init__(self, profile: Profile | None) -> None:
        self.label = "learnt from its own steps" if profile is None else profile.label
        self.learns = profile is None  # from the steps that are run, and nothing else
        self._seen: dict[tuple[int, int, int], _Cell] = {}
        self._steps = 0
        self.fits = 0  # the curve has changed so many times
        self._log = 0.0  # logarithm of the correction
        self._factor = 1.0
        self._base = self._copies = Curve((0.0,), (0.0,), (0.0,))
        self._decode = self._pairs = self._row = 0.0
        if profile is not None:
            self._fit(profile.points)
            if profile.copies:
                pages, seconds = zip(*profile.copies, strict=True)
                self._copies, _ = fit_curve(pages, [[] for _ in pages], seconds)

    @classmethod
    def from_profile(cls, profile: Profile) -> StepCost:
        return cls(profile)

    @classmethod
    def learning(cls) -> StepCost:
        return cls(None)

    @property
    def ready(self) -> bool:
        """Whether predictions rest on anything."""
        return not self.learns or bool(self._seen)

    @property
    def correction(self) -> float:
        """Observed over predicted time, smoothed over the last steps."""
        return self._factor

    def seconds(self, shape: StepShape) -> float:
        """Predicted wall time of a step. Never falls when anything in the shape grows."""
        return self._predict(shape.rows, shape.tokens, shape.decode_context, shape.chunk_pairs)

    def uncorrected(self, shape: StepShape) -> float:
        """The same, as the profile has it."""
        return self.seconds(shape) / self._factor

    def tokens_within(
        self, seconds: float, shape: StepShape, chunk_context: int, most: int = UNLIMITED
    ) -> int:
        """How many tokens a chunk after `chunk_context` positions may add to `shape`, as one more
        row, so that the step takes no more than `seconds`: the largest such number up to `most`, 0
        where there is none."""
        rows, decode = shape.rows + 1, shape.decode_context

        def fits(n: int) -> bool:
            pairs = shape.chunk_pairs + chunk_pairs(n, chunk_context)
            return self._predict(rows, shape.tokens + n, decode, pairs) <= seconds

        if most < 1 or fits(most):
            return max(most, 0)
        if not fits(1):
            return 0
        low, high = 1, 64
        while high < most and fits(high):
            low, high = high, high * 4
        high = min(high, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def copy_seconds(self, pages: int) -> float:
        """To copy so many KV pages between device and host memory, one way. 0 when unknown."""
        return self._copies(pages) if pages > 0 else 0.0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learns from a step that was run. Times that are no positive number are ignored."""
        if not (0.0 < seconds < math.inf) or shape.tokens < 1:
            return
        self._steps += 1
        if self.learns and self._collect(shape, seconds):
            self._fit(cell.point() for cell in self._seen.values())
            self._log, self._factor = 0.0, 1.0
            return
        predicted = self.seconds(shape)
        if predicted > 0.0:
            error = math.log(seconds / predicted)
            moved = self._log + _RATE * max(-_CLIP, min(_CLIP, error))
            self._log = max(-_BOUND, min(_BOUND, moved))
            self._factor = math.exp(self._log)

    def _predict(self, rows: int, tokens: int, decode_context: int, pairs: int) -> float:
        model = self._base(tokens) + self._row * rows
        return (model + self._decode * decode_context + self._pairs * pairs) * self._factor

    def _fit(self, points: Iterable[tuple[StepShape, float]]) -> None:
        points = list(points)
        self.fits += 1
        self._base, (self._decode, self._pairs, self._row) = fit_curve(
            [shape.tokens for shape, _ in points],
            [[shape.decode_context, shape.chunk_pairs, shape.rows] for shape, _ in points],
            [seconds for _, seconds in points],
        )

    def _collect(self, shape: StepShape, seconds: float) -> bool:
        """Puts a step among those of about its shape. True when it is time to fit again."""
        key = (
            shape.tokens.bit_length(),
            shape.decode_context.bit_length() // 2,
            shape.chunk_pairs.bit_length() // 2,
        )
        cell = self._seen.get(key)
        if cell is None:
            self._seen[key] = _Cell(shape, seconds)
        else:
            cell.learn(shape, seconds)
        if self._steps < _EARLY:
            return cell is None or self._steps & (self._steps - 1) == 0
        return self._steps % (_EARLY if self._steps < _REFIT else _REFIT) == 0


class _Cell:
    """Steps of about one shape: their running mean, the newest counting most."""

    def __init__(self, shape: StepShape, seconds: float) -> None:
        self._mean = [*_sizes(shape), seconds]
        self._count = 1

    def learn(self, shape: StepShape, seconds: float) -> None:
        self._count += 1
        rate = max(_RATE, 1.0 / self._count)
        # One slow step among many is an accident, or one of the first: no step is too fast.
        if self._count <= 3 and seconds < 0.5 * self._mean[-1]:
            self._mean[-1] = seconds
        seconds = min(seconds, 2.0 * self._mean[-1])
        for i, value in enumerate([*_sizes(shape), seconds]):
            self._mean[i] += rate * (value - self._mean[i])

    def point(self) -> tuple[StepShape, float]:
        return StepShape(*map(round, self._mean[:-1])), self._mean[-1]


def _sizes(shape: StepShape) -> tuple[int, int, int, int]:
    return shape.rows, shape.tokens, shape.decode_context, shape.chunk_pairs
