"""`DraftCost`: the seconds that drafting takes, learnt from the steps that drafted.

    seconds = rows · a + forwards of the draft model · b + tokens they compute · c

Without a draft model the tokens are those that were read, so that it is not the rows' price that a
text was read from its beginning. None negative. What has not been seen yet is taken to cost
nothing, so it is tried.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.fit import nonnegative
from scheduler.plan import DraftTime

Floats = NDArray[np.float64]

_KEEP = 0.995  # of what earlier steps say, per step;
# at first less, for the machine may still be waking up: about a quarter of the steps seen count.
_FIRST_KEPT = 4
_REFIT = 32  # steps
_CLIP = 3.0  # a step that took more than so many times what was predicted was disturbed


class DraftCost:
    """Least squares over the last few hundred steps.

    Of the seconds, not of the relative error: where times are skew that would stay below the mean.
    """

    def __init__(self) -> None:
        self._normal = np.zeros((3, 3))
        self._right = np.zeros(3)
        self._recent: list[tuple[float, ...]] = []  # rows, forwards, tokens, seconds
        self._coefficients = (0.0, 0.0, 0.0)
        self._steps = 0

    @property
    def seen(self) -> bool:
        """Whether anything was observed."""
        return self._steps > 0

    def observe(self, rows: int, work: DraftTime) -> None:
        """A step asked for drafts of so many rows."""
        if work.seconds <= 0.0:
            return
        predicted = self.total(rows, work.depth, work.tokens)
        seconds = min(work.seconds, _CLIP * predicted) if self._steps > _REFIT else work.seconds
        self._recent.append((rows, work.depth, work.tokens, seconds))
        self._steps += 1
        if self._steps % _REFIT == 0 or self._steps & (self._steps - 1) == 0:
            self._fit()

    def _fit(self) -> None:
        recent = np.array(self._recent, dtype=np.float64)
        self._recent.clear()
        seen, seconds = recent[:, :3], recent[:, 3]
        keep = min(_KEEP, 1.0 - _FIRST_KEPT / max(self._steps, 2 * _FIRST_KEPT))
        kept = keep ** np.arange(len(recent), 0, -1.0)
        weighted = seen * (kept / keep)[:, None]
        self._normal = kept[0] * self._normal + weighted.T @ seen
        self._right = kept[0] * self._right + weighted.T @ seconds
        # The active-set solver takes a matrix: a root of the normal equations does for it.
        normal = self._normal.copy()
        # Alone, a sequence has as many tokens computed as forwards made; these take the time then.
        normal[2, 2] *= 1.001
        values, vectors = np.linalg.eigh(normal)
        root = np.sqrt(np.clip(values, 1e-12 * max(values.max(), 1e-300), None))
        features = (vectors * root).T
        target = (vectors.T @ self._right) / root
        a, b, c = nonnegative(features, target).tolist()
        self._coefficients = a, b, c

    def total(self, rows: float, depth: int, tokens: float) -> float:
        """Seconds, for so many rows and forwards."""
        a, b, c = self._coefficients
        return a * rows + b * depth + c * tokens

    def seconds(
        self, rows: NDArray[np.int64], depth: NDArray[np.int64] | int, tokens: Floats | float
    ) -> Floats:
        """The same for many."""
        a, b, c = self._coefficients
        return np.asarray(a * rows + b * depth + c * tokens)

    def of_a_draft(self, rows: int) -> float:
        """Of one more draft of a model, side by side with those of so many rows."""
        _, b, c = self._coefficients
        return b / max(rows, 1) + c
