"""`Calibration`: what the confidence of a drafter is worth.

A drafter says of each draft how probable it is, given all before it. Multiplied up, that is its
belief that the text so far is right; how often it really is differs from drafter to drafter and
from text to text. So the share that was right is counted by belief, and a wanted share is turned
into the belief at which drafting should stop (the threshold policy of SpecDec++, arXiv 2405.19715,
with a table in place of its trained head).
"""

from __future__ import annotations

from bisect import bisect_right

# Beliefs between two of these are counted together.
EDGES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_LOW = (0.0, *EDGES)
_CENTRES = tuple((low + high) / 2 for low, high in zip(_LOW, (*EDGES, 1.0), strict=True))
_PRIOR = 8.0  # drafts that stand for the belief itself
_KEEP = 0.99  # of what was counted, per draft of about that belief


class Calibration:
    """Of one drafter."""

    __slots__ = ("_believed", "_came_true", "_counted", "_right")

    def __init__(self) -> None:
        self._believed = self._came_true = 1.0
        self._counted = [0.0] * len(_LOW)
        self._right = [0.0] * len(_LOW)

    def learn(self, confidence: tuple[float, ...], accepted: int) -> None:
        """Drafts with these confidences were verified, so many of them right."""
        self._believed *= _KEEP
        self._came_true = _KEEP * self._came_true + accepted
        belief = 1.0
        for position, one in enumerate(confidence):
            belief *= one
            self._believed += belief
            at = bisect_right(EDGES, belief)
            self._counted[at] = _KEEP * self._counted[at] + 1.0
            self._right[at] = _KEEP * self._right[at] + (position < accepted)

    @property
    def honesty(self) -> float:
        """Right drafts for each that it expected to be right."""
        return self._came_true / self._believed

    def threshold(self, least: float) -> float:
        """The belief down to which at least that share is right.

        A belief that has not been seen yet is taken to be worth as much less than the next higher
        one as it says itself, so that the threshold can move to where nothing was counted.
        """
        share = below = 1.0
        stop = 1.0
        for at in reversed(range(len(_LOW))):
            prior = min(share * _CENTRES[at] / below, 1.0)
            share = (_PRIOR * prior + self._right[at]) / (_PRIOR + self._counted[at])
            below = _CENTRES[at]
            if share < least:
                return stop
            stop = _LOW[at]
        return stop
