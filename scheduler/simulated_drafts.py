"""Drafts in simulation: which are right is recorded in the trace, what they take is given."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from scheduler.plan import NO_DRAFTING, DraftTime, StepPlan

# Multiples of it, modulo one, are spread evenly: as good as random, and the same each time.
_SPREAD = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class DraftingCosts:
    """What a draft model takes, one forward after the other, and where it runs.

    With a device of its own it works ahead while the target verifies, for the likely outcomes: all
    drafts right and the token after them as well, or the first wrong one replaced by a token it has
    foreseen. Then the next drafts are there when the target is done, or as soon as they can be.
    """

    forward: float  # seconds
    token: float = 0.0  # seconds more for each row of a forward
    ahead: bool = False
    foreseen: float = 0.0  # share of corrections that it has drafted on for


class Drafts:
    """What became of each slot's drafts, and what the next ones take."""

    def __init__(self, slots: int, costs: DraftingCosts | None) -> None:
        self._costs = costs
        self._right = [""] * (slots + 1)
        self._ready = [False] * (slots + 1)  # drafts for what came were made while it was verified

    def admit(self, slot: int, right: str) -> None:
        self._right[slot], self._ready[slot] = right, False

    def draft(self, plan: StepPlan, over: Container[int]) -> tuple[DraftTime, set[int]]:
        """What the target waits for before it verifies, and the slots that go without drafts, but
        for those that are over."""
        asked = [row for row in plan.rows if row.drafts and row.slot not in over]
        if self._costs is None or not asked:
            return NO_DRAFTING, set()
        hidden = [row for row in asked if self._ready[row.slot]]
        now = [row for row in asked if not self._ready[row.slot]]
        without: set[int] = set()
        if len(now) < plan.patience:
            without, now = {row.slot for row in now}, []
        drafts = [row.drafts for row in asked if row.slot not in without]
        seconds = self._chain([row.drafts for row in now])
        work = DraftTime(seconds, max(drafts, default=0), sum(drafts), foreseen=len(hidden))
        return work, without

    def _chain(self, drafts: list[int]) -> float:
        assert self._costs is not None
        return max(drafts, default=0) * self._costs.forward + sum(drafts) * self._costs.token

    def verify(self, slot: int, produced: int, drafts: int, ahead: int) -> int:
        """How many drafts after so many output tokens are right; `ahead` others are made while
        that is found out."""
        right = self._right[slot]
        run = 0
        while run <= drafts and right[produced + run : produced + run + 1] == "1":
            run += 1
        self._ready[slot] = False
        if self._costs is not None and self._costs.ahead and ahead:
            chance = (produced + 1) * _SPREAD % 1.0
            self._ready[slot] = run > drafts or (run < drafts and chance < self._costs.foreseen)
        return min(run, drafts)

    def verified(
        self, plan: StepPlan, over: Container[int], work: DraftTime, seconds: float
    ) -> DraftTime:
        """Verification has taken so long: what drafting has taken, with what was done beside."""
        ahead = [row.ahead + 1 for row in plan.rows if row.ahead and row.slot not in over]
        if self._costs is None or not self._costs.ahead or not ahead:
            return work
        beside = self._chain(ahead)
        late = max(beside - seconds, 0.0)
        return work._replace(seconds=work.seconds + late, beside=beside, ahead=len(ahead))
