"""`VerifyCost`: the seconds of steps with and without drafts, as they are now; `Idle`: what lies
between them.

`StepCost` knows how a step's time depends on its shape, and follows the machine by one factor. What
is asked here is a difference of a few per cent between two shapes, of which only one is run at a
time; so each of the two has a factor of its own, and neither is moved by the other's steps.
"""

from __future__ import annotations

from collections import deque

from scheduler.profile import StepShape
from scheduler.step_cost import StepCost

LEAST_PLAIN = 6  # steps without drafts before there are any
# Steps with drafts after which plain ones have to be seen again: at first, when what is known of
# them is from a machine that was still waking up; doubled each time, up to the most.
FIRST_STALE, STALE = 32, 512
RECENT = 12  # plain steps that say what they take
_RATE = 0.05  # smoothing, per step with drafts
_CLIP = 2.0  # of a factor: steps that were so much slower or faster were disturbed


class VerifyCost:
    """Of steps with live rows, whatever chunks of prompts they have beside."""

    def __init__(self, cost: StepCost, beside: float = 1.0) -> None:
        """`beside`: see `Controller`."""
        self._cost = cost
        # Shape, seconds and weight of the latest plain steps. They are few where there are always
        # drafts, and the profile may change meanwhile: so they are kept, and not what they were
        # times the prediction of their day.
        self._recent: deque[tuple[StepShape, float, float]] = deque(maxlen=RECENT)
        self._plain: float | None = None  # what they say; None: to be found
        self._fits = 0  # of the profile, when that was found
        # The same with drafts, over that: as such, and beside a draft model that works ahead.
        self._drafted = {False: 1.0, True: beside}
        self._ahead_steps = 0
        self._plain_steps = 0
        self._since_plain = 0
        self._stale_after = FIRST_STALE

    @property
    def ready(self) -> bool:
        """Whether plain steps were seen: what drafts bring is known only against them."""
        return self._cost.ready and self._plain_steps >= LEAST_PLAIN

    @property
    def stale(self) -> int:
        """Whether they were seen too long ago: so many times as long as they may be."""
        return self._since_plain // self._stale_after

    def plain(self, shape: StepShape) -> float:
        """Of a step without drafts."""
        return self._cost.uncorrected(shape) * self._factor()

    def drafted(self, shape: StepShape) -> float:
        """Of a step with drafts."""
        return self.plain(shape) * self._drafted[False]

    @property
    def beside(self) -> float:
        """How many times as long that is while a draft model works for the next step."""
        return self._drafted[True] / self._drafted[False]

    def observe(
        self, shape: StepShape, live: int, drafts: bool, seconds: float, ahead: bool = False
    ) -> None:
        """A step has taken so long; `live`: its rows that are no chunks of prompts, for what a step
        takes that is mostly prompts says little about one that has none; `ahead`: while a draft
        model worked for the next."""
        if seconds <= 0.0 or shape.tokens < 1:
            return
        if not drafts:
            if self.stale:
                self._stale_after = min(2 * self._stale_after, STALE)
            self._plain_steps, self._since_plain = self._plain_steps + 1, 0
            self._recent.append((shape, seconds, live / shape.tokens))
            self._plain = None
            return
        self._since_plain += 1
        predicted = self.plain(shape)
        if predicted <= 0.0:
            return
        ratio, known = _clipped(seconds / predicted), self._drafted[ahead]
        rate = _RATE
        if ahead:  # at first it is a guess, and there may be few steps to see
            self._ahead_steps += 1
            rate = max(_RATE, 1.0 / self._ahead_steps)
        self._drafted[ahead] = known + rate * (ratio - known)

    def _factor(self) -> float:
        """Observed over predicted of the latest plain steps, by the profile of now."""
        if self._plain is None or self._fits != self._cost.fits:
            self._fits = self._cost.fits
            found = [(w * self._cost.uncorrected(shape), w * s) for shape, s, w in self._recent]
            expected = sum(p for p, _ in found)
            self._plain = 1.0
            if expected > 0.0:
                usual = sum(s for _, s in found) / expected
                # One slow step among many is an accident.
                self._plain = sum(min(s, _CLIP * usual * p) for p, s in found) / expected
        return self._plain


class Idle:
    """Seconds from one step to the next in which nothing is computed: of the latest, the mean of
    the middle half.

    A step with drafts begins when the one before it has been read, and is read before the next one
    begins; plain steps follow each other unread. Requests that come, or a collector at work, make
    any step wait, and few plain ones are seen where there are always drafts: by their mean, plain
    decoding would be charged with such a wait for long.
    """

    def __init__(self) -> None:
        # By whether there are drafts on either side.
        self._seconds: dict[bool, deque[float]] = {
            False: deque(maxlen=RECENT),
            True: deque(maxlen=RECENT),
        }
        self._usual = {False: 0.0, True: 0.0}

    def observe(self, seconds: float, *, drafts: bool) -> None:
        """`seconds` may be negative: the two ends of a step are told with some scatter."""
        recent = self._seconds[drafts]
        recent.append(seconds)
        middle = sorted(recent)[len(recent) // 4 : -(len(recent) // 4) or None]
        self._usual[drafts] = sum(middle) / len(middle)

    @property
    def plain(self) -> float:
        return max(self._usual[False], 0.0)

    @property
    def drafted(self) -> float:
        """As between plain steps, until it was seen."""
        return self.plain + self.added

    @property
    def added(self) -> float:
        """How much longer it is beside drafts."""
        return max(self._usual[True] - self.plain, 0.0) if self._seconds[True] else 0.0


def _clipped(ratio: float) -> float:
    return min(max(ratio, 1 / _CLIP), _CLIP)
