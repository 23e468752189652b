"""Fits of times by non-negative sums: monotone piecewise linear in one size, linear in others."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SPACING = 1.4  # knots are at least so far apart, as a ratio: closer ones would fit the noise
_RIDGE = 1e-12


@dataclass(frozen=True, slots=True)
class Curve:
    """A monotone piecewise linear function: flat before the first knot, and beyond the last as
    steep as the last piece, but no flatter than the whole: nothing is free in the end."""

    knots: tuple[float, ...]
    values: tuple[float, ...]  # at the knots
    slopes: tuple[float, ...]  # from each knot on

    def __call__(self, x: float) -> float:
        i = bisect_right(self.knots, x) - 1
        if i < 0:
            return self.values[0]
        return self.values[i] + self.slopes[i] * (x - self.knots[i])


def fit_curve(
    sizes: Sequence[float], others: Sequence[Sequence[float]], seconds: Sequence[float]
) -> tuple[Curve, tuple[float, ...]]:
    """`seconds ≈ curve(size) + others · coefficients`, by least squares of the relative error.

    `sizes` [n], `others` [n, m], `seconds` [n], positive. A monotone piecewise linear curve is a
    non-negative sum of ramps between its knots, so everything is one non-negative least squares.
    """
    size = np.asarray(sizes, dtype=np.float64)
    knots = _thin(sorted(set(sizes)))
    starts, ends = np.array(knots[:-1]), np.array(knots[1:])
    ramps = np.clip(size[:, None] - starts, 0.0, ends - starts)
    extra = np.asarray(others, dtype=np.float64).reshape(len(size), -1)
    # What never changes says nothing that the curve's own constant does not.
    extra = np.where(np.ptp(extra, axis=0) > 0.0, extra, 0.0)
    features = np.hstack([np.ones((len(size), 1)), ramps, extra])
    target = np.asarray(seconds, dtype=np.float64)
    weights = nonnegative(features / target[:, None], np.ones(len(size)))
    slopes = weights[1 : len(knots)].tolist()
    values = weights[0] + np.concatenate([[0.0], np.cumsum(slopes * (ends - starts))])
    whole = (values[-1] - values[0]) / (knots[-1] - knots[0]) if slopes else 0.0
    slopes.append(max(slopes[-1], whole) if slopes else 0.0)
    curve = Curve(tuple(knots), tuple(values.tolist()), tuple(map(float, slopes)))
    return curve, tuple(weights[len(knots) :].tolist())


def _thin(sizes: list[float]) -> list[float]:
    """The first, the last, and of those between no two closer than the spacing."""
    kept = sizes[:1]
    for size in sizes[1:-1]:
        if size >= kept[-1] * _SPACING and size * _SPACING <= sizes[-1]:
            kept.append(size)
    return kept + sizes[-1:] if len(sizes) > 1 else kept


def nonnegative(features: Floats, target: Floats) -> Floats:
    """The x >= 0 that minimises |features x - target| (Lawson and Hanson's active sets)."""
    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0.0] = 1.0
    a = features / scale
    count = a.shape[1]
    # The normal equations, for speed; the ridge keeps columns that say the same solvable.
    normal, right = a.T @ a + _RIDGE * np.eye(count), a.T @ target
    x = np.zeros(count)
    free = np.zeros(count, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.linalg.norm(target)))
    for _ in range(3 * count):
        gain = right - normal @ x
        gain[free] = -np.inf
        best = int(np.argmax(gain))
        if gain[best] <= tolerance:
            break
        free[best] = True
        while True:
            goal = np.zeros(count)
            goal[free] = np.linalg.solve(normal[np.ix_(free, free)], right[free])
            below = free & (goal <= 0.0)
            if not below.any():
                break
            steps = x[below] / np.maximum(x[below] - goal[below], 1e-300)
            x = x + float(steps.min()) * (goal - x)
            free &= ~(below & (x <= 1e-12))
            free[np.flatnonzero(below)[int(np.argmin(steps))]] = False
            x[~free] = 0.0
        x = goal
    return x / scale
