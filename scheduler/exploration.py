"""`Exploration`: what may be spent on finding out whether drafts would pay, while nobody drafts.

There are probes, drafts that only tell how good drafts would be, and decisions, which look at what
is known by now. Both have a share of the time, and can be saved up a little. A probe is let in by
what it is predicted to take, and charged what it took.

Where no profile tells what steps take, both have more at first: what is known then is from a
machine that was still waking up, on which drafts may have seemed to take several times what they
take.
"""

from __future__ import annotations

PROBE_SHARE = 0.003  # of the time
DECISION_SHARE = 0.004
EARLY_PROBES, EARLY_DECISIONS = 4.0, 2.0  # of the n-th step's time, over n
DECISION = 1e-3  # seconds that one takes at most: the scheduler has no clock to measure that with
SAVED_DECISIONS = 2
SAVED_PROBES = 1.0  # seconds


class Exploration:
    """Counts seconds."""

    def __init__(self, cold: bool = True) -> None:
        """`cold`: no profile tells what steps take."""
        self._cold = cold
        self._for_probes = 0.0
        self._steps = 0
        self._for_decisions = SAVED_DECISIONS * DECISION
        self._price: float | None = None  # of the probe that is under way

    def earn(self, seconds: float, steps: int = 1) -> None:
        """So much time has passed in so many steps."""
        self._steps += steps
        early = self._cold / self._steps
        share = PROBE_SHARE + EARLY_PROBES * early
        self._for_probes = min(self._for_probes + share * seconds, SAVED_PROBES)
        most = SAVED_DECISIONS * DECISION
        share = DECISION_SHARE + EARLY_DECISIONS * early
        self._for_decisions = min(self._for_decisions + share * seconds, most)

    @property
    def early(self) -> bool:
        """Whether most of what probes have is what they have more at first."""
        return self._cold and self._steps * PROBE_SHARE < EARLY_PROBES

    def decide(self) -> bool:
        """Whether there may be a decision now, which is then paid."""
        if self._for_decisions < DECISION:
            return False
        self._for_decisions -= DECISION
        return True

    def probe(self, price: float) -> bool:
        """Whether there may be a probe now that is predicted to take so long. If there was no room
        for it in the step after all, it is never charged and has cost what was predicted."""
        if price > self._for_probes:
            return False
        self._for_probes -= price
        self._price = price
        return True

    @property
    def probing(self) -> bool:
        """A probe was let in and has not been charged."""
        return self._price is not None

    def charge(self, seconds: float) -> None:
        """The probe has taken so long."""
        assert self._price is not None
        self._for_probes += self._price - seconds
        self._price = None
