"""`VerifyCost`: the seconds of steps with and without drafts, as they are now; `Idle`: what lies
between them.

`StepCost` knows how a step's time depends on its shape, and follows the machine by one factor. What
is asked here is a difference of a few per cent between two shapes, of which only one is run at a
time; so each of the two has a factor of its own, and neither is moved by the other's steps.
"""

from __future__ import annotations

from scheduler.profile import StepShape
from scheduler.step_cost import StepCost

LEAST_PLAIN = 6  # steps without drafts before there are any
# Steps with drafts after which plain ones have to be seen again: at first, when what is known of
# them is from a machine that was still waking up; doubled each time, up to the most.
FIRST_STALE, STALE = 32, 512
_RATE = 0.05  # smoothing, per step
_AFTER = 3  # the n-th plain step after drafts counts as much as n + 3 would on average
_CLIP = 2.0  # of a factor: steps that were so much slower or faster were disturbed


class VerifyCost:
    """Of steps with live rows, whatever chunks of prompts they have beside."""

    def __init__(self, cost: StepCost, beside: float = 1.0) -> None:
        """`beside`: see `Controller`."""
        self._cost = cost
        self._plain = 1.0  # observed over predicted, without drafts
        # The same with drafts, over that: as such, and beside a draft model that works ahead.
        self._drafted = {False: 1.0, True: beside}
        self._ahead_steps = 0
        self._plain_steps = 0
        self._in_a_row = 0  # of these, since the last step with drafts
        self._since_plain = 0
        self._stale_after = FIRST_STALE

    @property
    def ready(self) -> bool:
        """Whether plain steps were seen: what drafts bring is known only against them."""
        return self._cost.ready and self._plain_steps >= LEAST_PLAIN

    @property
    def stale(self) -> bool:
        """Whether they were seen too long ago."""
        return self._since_plain >= self._stale_after

    def plain(self, shape: StepShape) -> float:
        """Of a step without drafts."""
        return self._cost.uncorrected(shape) * self._plain

    def drafted(self, shape: StepShape) -> float:
        """Of a step with drafts."""
        return self.plain(shape) * self._drafted[False]

    @property
    def beside(self) -> float:
        """How many times as long that is while a draft model works for the next step."""
        return self._drafted[True] / self._drafted[False]

    def observe(self, shape: StepShape, drafts: bool, seconds: float, ahead: bool = False) -> None:
        """A step has taken so long; `ahead`: while a draft model worked for the next."""
        predicted = self.plain(shape)
        if predicted <= 0.0 or seconds <= 0.0:
            return
        if not drafts:
            if self.stale:
                self._stale_after = min(2 * self._stale_after, STALE)
            self._plain_steps, self._since_plain = self._plain_steps + 1, 0
            self._in_a_row += 1
            rate = max(_RATE, 1.0 / self._plain_steps, 1.0 / (self._in_a_row + _AFTER))
            self._plain *= 1.0 + rate * (_clipped(seconds / predicted) - 1.0)
        else:
            self._since_plain += 1
            self._in_a_row = 0
            ratio, known = _clipped(seconds / predicted), self._drafted[ahead]
            rate = _RATE
            if ahead:  # at first it is a guess, and there may be few steps to see
                self._ahead_steps += 1
                rate = max(_RATE, 1.0 / self._ahead_steps)
            self._drafted[ahead] = known + rate * (ratio - known)


class Idle:
    """Seconds from one step to the next in which nothing is computed.

    A step with drafts begins when the one before it has been read, and is read before the next one
    begins; plain steps follow each other unread.
    """

    def __init__(self) -> None:
        self._seconds = {False: 0.0, True: 0.0}  # by whether there are drafts on either side
        self._steps = {False: 0, True: 0}

    def observe(self, seconds: float, *, drafts: bool) -> None:
        self._steps[drafts] += 1
        rate = max(_RATE, 1.0 / self._steps[drafts])
        self._seconds[drafts] += rate * (seconds - self._seconds[drafts])

    @property
    def plain(self) -> float:
        return self._seconds[False]

    @property
    def drafted(self) -> float:
        """As between plain steps, until it was seen."""
        return self.plain + self.added

    @property
    def added(self) -> float:
        """How much longer it is beside drafts."""
        return max(self._seconds[True] - self.plain, 0.0) if self._steps[True] else 0.0


def _clipped(ratio: float) -> float:
    return min(max(ratio, 1 / _CLIP), _CLIP)
